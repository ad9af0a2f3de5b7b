"""What every backend that runs on a GPU shares: CUDA's runtime, the kernel library, collectives, the session."""
