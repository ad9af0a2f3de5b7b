"""cqil-serve: an OpenAI-compatible server in front of an engine.

Every rank executes the engine (`ranks`); rank 0 schedules, and the others follow its orders. The HTTP server is a
process of its own (`frontend`), started by rank 0: it tokenizes, talks to clients, and watches the ranks, so it can
still tell clients what happened when a rank is gone.
"""
