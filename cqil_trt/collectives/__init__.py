"""Communicators: how the ranks of one engine exchange tensors."""

from cqil_trt.collectives.base import Communicator, LocalCommunicator
from cqil_trt.collectives.host import HostCommunicator
from cqil_trt.collectives.peers import agree, split

__all__ = ["Communicator", "HostCommunicator", "LocalCommunicator", "agree", "split"]
