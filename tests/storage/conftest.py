"""Two object stores, a folder on this machine and an S3 server (moto's), as profiles of NVIDIA's Multi-Storage Client;
and a profile whose server does not answer."""

from __future__ import annotations

import itertools
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_prune import storage
from tests.training.conftest import tiny_pruned

__all__ = ["tiny_pruned"]

BUCKET = "bucket"


@dataclass(frozen=True)
class Store:
    """An empty part of a store."""

    url: str

    def __call__(self, name: str) -> str:
        return f"{self.url}/{name}"

    def path(self, name: str) -> Any:
        return storage.path(self(name))

    def put(self, folder: Path, name: str) -> str:
        """A copy of ``folder`` there."""
        storage.copy_files(folder, self.path(name))
        return self(name)

    def fetch(self, name: str, folder: Path) -> Path:
        """A copy of what is there, made by the client's own tools."""
        import multistorageclient

        multistorageclient.sync(self(name), str(folder), ignore_hidden=False)
        return folder


def _s3(port: int) -> dict[str, Any]:
    options = {"base_path": BUCKET, "region_name": "us-east-1", "endpoint_url": f"http://127.0.0.1:{port}"}
    keys = {"type": "S3Credentials", "options": {"access_key": "key", "secret_key": "secret"}}
    return {"storage_provider": {"type": "s3", "options": options}, "credentials_provider": keys}


@pytest.fixture(scope="session")
def profiles(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Path of a configuration with the profiles ``disk``, ``s3`` (its server runs) and ``silent``."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    port = server.get_host_and_port()[1]
    boto3.client(
        "s3", endpoint_url=f"http://127.0.0.1:{port}", region_name="us-east-1",
        aws_access_key_id="key", aws_secret_access_key="secret",
    ).create_bucket(Bucket=BUCKET)  # fmt: skip
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and never listens
        folder = tmp_path_factory.mktemp("stores")
        disk = {"storage_provider": {"type": "file", "options": {"base_path": str(folder)}}}
        silent = _s3(nobody.getsockname()[1])
        silent["retry"] = {"attempts": 1}
        config = folder.parent / "msc.yaml"
        config.write_text(yaml.safe_dump({"profiles": {"disk": disk, "s3": _s3(port), "silent": silent}}))
        yield config
    server.stop()


@pytest.fixture
def configured(profiles: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process and the jobs that it starts know the profiles."""
    monkeypatch.setenv("MSC_CONFIG", str(profiles))


_numbers = itertools.count()


@pytest.fixture(params=["disk", "s3"])
def store(request: pytest.FixtureRequest, configured: None) -> Store:
    """Each of the two."""
    return Store(f"msc://{request.param}/{next(_numbers)}")


@pytest.fixture
def disk(configured: None) -> Store:
    return Store(f"msc://disk/{next(_numbers)}")


@pytest.fixture
def s3(configured: None) -> Store:
    return Store(f"msc://s3/{next(_numbers)}")
