"""Before anything else is imported: one thread, no network, no telemetry. Then the fixtures that all tests share."""

import os

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", FLWR_TELEMETRY_ENABLED="0", FLWR_DISABLE_UPDATE_CHECK="1")

import socket
import tempfile

import hypothesis.configuration
import pytest
import tiny
import torch
from transformers.utils import logging as transformers_logging

from consilium import algorithms

torch.set_num_threads(1)
transformers_logging.disable_progress_bar()
algorithms.register_all()

# No example database: tests write to pytest's temporary directories and nowhere else.
hypothesis.settings.register_profile("consilium", database=None, deadline=None, derandomize=True, max_examples=30)
hypothesis.settings.load_profile("consilium")
_scratch = tempfile.TemporaryDirectory(prefix="hypothesis-")
hypothesis.configuration.set_hypothesis_home_dir(_scratch.name)


def pytest_addoption(parser):
    parser.addoption("--rewrite", action="store_true", help="of the pages of test_transcripts.py")


@pytest.fixture(scope="session", autouse=True)
def _tiny_models(tmp_path_factory):
    """Where `tiny` writes its models."""
    tiny.root = tmp_path_factory.mktemp("tiny")


@pytest.fixture(scope="session", autouse=True)
def _loopback_only():
    """A test that reaches for the network fails, whoever asked: only this machine may be talked to."""
    connect, connect_ex, lookup = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo

    def local(host: object) -> bool:
        return str(host) in ("localhost", "::1", "None", "") or str(host).startswith("127.")

    def guarded(real):
        def call(self, address):
            if self.family in (socket.AF_INET, socket.AF_INET6) and not local(address[0]):
                pytest.fail(f"a test tried to connect to {address}")
            return real(self, address)

        return call

    def resolve(host, *args, **kwargs):
        if not local(host):
            pytest.fail(f"a test tried to look up {host}")
        return lookup(host, *args, **kwargs)

    patch = pytest.MonkeyPatch()
    patch.setattr(socket.socket, "connect", guarded(connect))
    patch.setattr(socket.socket, "connect_ex", guarded(connect_ex))
    patch.setattr(socket, "getaddrinfo", resolve)
    yield
    patch.undo()
