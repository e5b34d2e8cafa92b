"""Models on the Hugging Face hub: planned from headers fetched by range requests, downloaded when read."""

from __future__ import annotations

import contextlib
import importlib
import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from weightsmith.core.errors import NoBaseError, SourceError, public
from weightsmith.io.disk import write_file
from weightsmith.io.package.companions import beside_adapter
from weightsmith.io.read.adapter import CONFIG as ADAPTER_CONFIG
from weightsmith.io.read.adapter import MLX_WEIGHTS
from weightsmith.io.read.folder import (
    INDEX,
    WEIGHTS,
    FolderSource,
    check_present,
    choose_weights,
    join,
    parse_index,
    refuse_stale,
)
from weightsmith.io.read.safetensors import Header, parse_header, parse_length
from weightsmith.io.read.source import Bits, Cost, Origin, Source, stores_of
from weightsmith.io.system import read_file
from weightsmith.io.url import said

__all__ = ["OTHER", "PREFIX", "HubSource", "Repo", "looks_like_hub_id", "open_hub"]

PREFIX = "hf://"
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*(?:@[\w./+-]+)?")
_FIRST = 100_000  # bytes of the first request for a header; most are smaller than this
_WORKERS = 4
_TIMEOUT = 20.0  # seconds
_CONFIGS = ("config.json", "generation_config.json", "tokenizer_config.json")
OTHER = re.compile(
    rf".*\.({'|'.join((*WEIGHTS, 'pkl', 'pickle', 'zip', 'tar', 'gz'))})"
    r"|.*\.index\.json|(.*/)?\.[^/]*"
)


def looks_like_hub_id(ref: str) -> bool:
    """Whether a text can be `org/name[@revision]`: exactly one slash before the '@', and no path's first letters.

    `hf://org/name` says so explicitly, where a local folder is called like the organisation.
    """
    if ref.startswith(PREFIX):
        return _ID.fullmatch(ref.removeprefix(PREFIX)) is not None
    return _ID.fullmatch(ref) is not None and not Path(ref.split("/")[0]).exists()


@dataclass(frozen=True)
class Repo:
    """One commit of a repository on the hub, which `revision` was when asked for.

    sizes    file name -> bytes
    digests  name of a large file -> SHA-256 of its bytes, as the hub states it
    """

    name: str
    commit: str
    sizes: Mapping[str, int] = field(repr=False)
    revision: str = "main"
    endpoint: str | None = None
    cache: Path | None = None
    digests: Mapping[str, str] = field(default_factory=dict, repr=False)

    @classmethod
    def find(cls, name: str, revision: str | None, endpoint: str | None = None, cache: Path | None = None) -> Repo:
        """Ask the hub which commit a revision is, and which files it has (one request)."""
        import huggingface_hub

        if revision is not None and ".." in revision:  # git allows none either, and the cache has a file of that name
            raise SourceError(f"{name}: {revision!r} is no revision")
        with _hub_errors(name, revision, endpoint):
            info = huggingface_hub.HfApi(endpoint=endpoint).model_info(
                name, revision=revision, files_metadata=True, timeout=_TIMEOUT
            )
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
        digests = {file.rfilename: file.lfs.sha256 for file in info.siblings or [] if file.lfs}
        return cls(name, str(info.sha), sizes, revision or "main", endpoint, cache, digests)

    def fetch(self, file: str) -> Path:
        """Return a file's path in the cache, downloaded if it is not there."""
        import huggingface_hub

        with _hub_errors(f"{self.name}/{file}", self.commit, self.endpoint):
            path = huggingface_hub.hf_hub_download(
                self.name, file, revision=self.commit, endpoint=self.endpoint, cache_dir=self.cache
            )
        return Path(path)

    def note_revision(self) -> None:
        """Let the cache know which commit the revision was, so that it is found offline by that word too."""
        from huggingface_hub import constants, file_download

        folder = file_download.repo_folder_name(repo_id=self.name, repo_type="model")
        note = Path(self.cache or constants.HF_HUB_CACHE) / folder / "refs" / self.revision
        write_file(note, self.commit)

    def cached(self, file: str) -> bool:
        """Whether a file is in the cache already."""
        import huggingface_hub

        found = huggingface_hub.try_to_load_from_cache(self.name, file, cache_dir=self.cache, revision=self.commit)
        return isinstance(found, str)

    def header(self, file: str) -> Header:
        """Read the header of a safetensors file by range requests."""
        label, size = f"{self.name}/{file}", self.sizes[file]
        first = self.ranged(file, 0, min(_FIRST, size))
        length = parse_length(first[:8], size, label)
        raw = first[8 : 8 + length]
        if len(raw) < length:
            raw += self.ranged(file, 8 + len(raw), 8 + length)
        return parse_header(raw, size, label)

    def ranged(self, file: str, start: int, stop: int) -> bytes:
        """Bytes start..stop of a file."""
        from huggingface_hub import hf_hub_url

        utils: Any = importlib.import_module("huggingface_hub.utils")  # it does not mark what it re-exports

        url = hf_hub_url(self.name, file, revision=self.commit, endpoint=self.endpoint)
        # identity: a compressed answer would count other bytes than the range does
        headers = {**utils.build_hf_headers(), "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        got = bytearray()
        with (
            _hub_errors(f"{self.name}/{file}", self.commit, self.endpoint),
            utils.http_stream_backoff("GET", url, headers=headers, timeout=_TIMEOUT, max_retries=2) as response,
        ):
            utils.hf_raise_for_status(response)
            skipped = 0 if response.status_code == 206 else start  # a server without ranges sends all from the start
            for part in response.iter_raw():
                got += part
                if len(got) >= skipped + stop - start:
                    break
        wanted = bytes(got[skipped : skipped + stop - start])
        if len(wanted) < stop - start:
            raise SourceError(f"{self.name}/{file}: the hub sent {len(wanted)} of {stop - start} bytes")
        return wanted


class HubSource(Source):
    """The model in one commit of a repository on the hub.

    Listing keys costs the configs and the headers.  `prepare`, or the first `bits`, downloads the weights
    and their companions into the hub cache.
    """

    def __init__(self, repo: Repo, label: str | None = None) -> None:
        self.repo = repo
        label = label or repo.name
        self._lock = threading.Lock()
        self._local: FolderSource | None = None
        chosen = choose_weights([name for name in repo.sizes if "/" not in name], label)
        if chosen.removesuffix(INDEX).endswith(".bin"):
            raise SourceError(
                f"{label}: has only pickled weights ({chosen}), which cannot be planned from their header; "
                f"download it (hf download {repo.name}) and give the folder"
            )
        named = None
        self._weights = [chosen]
        if chosen.endswith(INDEX):
            named = parse_index(read_file(repo.fetch(chosen)), f"{repo.name}/{chosen}")
            refuse_stale(chosen, named, repo.sizes, label)
            check_present(named, repo.sizes, f"{repo.name}/{chosen}")
            self._weights = sorted(set(named.values()))
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(_WORKERS) as pool:
            headers = dict(zip(self._weights, pool.map(repo.header, self._weights), strict=True))
        catalogue = join(headers, label, named)
        self.keys, self.aliases = catalogue.keys, catalogue.aliases
        self._headers = {name: header.digest for name, header in headers.items()}
        configs = [repo.fetch(name) for name in _CONFIGS if name in repo.sizes]
        folder = configs[0].parent if configs else None
        missing = sum(repo.sizes[name] for name in self.files if not repo.cached(name))
        self.origin = Origin(
            label,
            folder,
            files=tuple(self._weights),
            locations=() if folder is None else (folder,),
            remarks=catalogue.remarks(),
            stores=stores_of(chosen),
            cost=Cost(download=missing),
        )

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    @property
    def files(self) -> tuple[str, ...]:
        """What `prepare` fetches: the weights, and every companion that is no weight file of another format."""
        companions = [name for name in self.repo.sizes if not OTHER.fullmatch(name)]
        return (*self._weights, *companions)

    def prepare(self) -> None:
        self._folder()

    def block(self, name: str, low: int = 0, high: int | None = None, into: np.ndarray | None = None) -> Bits:
        return self._folder().block(self.key(name).name, low, high, into)

    def fingerprint(self) -> dict[str, Any]:
        if self._local is not None:
            self._local.fingerprint()  # refuses files that changed since they were downloaded
        files: dict[str, Any] = {}
        for name in self._weights:
            files[name] = {"size": self.repo.sizes[name], "header": self._headers[name]}
            if name in self.repo.digests:
                files[name]["sha256"] = self.repo.digests[name]
        return {"hub": self.repo.name, "commit": self.repo.commit, "files": files}

    def _folder(self) -> FolderSource:
        with self._lock:
            if self._local is None:
                from concurrent.futures import ThreadPoolExecutor

                with ThreadPoolExecutor(_WORKERS) as pool:
                    paths = dict(zip(self.files, pool.map(self.repo.fetch, self.files), strict=True))
                folder = paths[self._weights[0]].parent
                local = FolderSource(folder)
                if local.keys != self.keys:
                    raise SourceError(f"{self}: the download is not the model that was planned; delete {folder}")
                self.origin = replace(self.origin, folder=folder, locations=(folder,), cost=Cost())
                self.repo.note_revision()
                self._local = local
            return self._local


def open_hub(
    ref: str, base: Source | None = None, endpoint: str | None = None, cache: str | Path | None = None
) -> Source:
    """Open `org/name[@revision]`: a model, or a LoRA adapter on `base`.

    The revision is pinned to the commit found now.  Where the hub cannot be reached, a model that is whole in
    the cache is used from there.  Errors: offline and not in the cache, no such repository or revision.
    """
    name, _, revision = ref.removeprefix(PREFIX).partition("@")
    place = Path(cache) if cache else None
    try:
        repo = Repo.find(name, revision or None, endpoint, place)
    except _UnreachableError:
        folder = _cached_folder(name, revision or None, place)
        if folder is None:
            raise
        return _open_adapter(folder, base, ref) if (folder / ADAPTER_CONFIG).exists() else _labelled(folder, ref)
    if ADAPTER_CONFIG in repo.sizes:
        # Adapters are small, and their meaning is in the config: fetch both at once.
        names = [file for file in repo.sizes if file.startswith(("adapter_", MLX_WEIGHTS)) and "/" not in file]
        paths = [repo.fetch(file) for file in (*names, *beside_adapter(repo.sizes))]
        repo.note_revision()
        return _open_adapter(paths[0].parent, base, ref)
    return HubSource(repo, ref)


def _labelled(folder: Path, ref: str) -> Source:
    source = FolderSource(folder)
    source.origin = replace(source.origin, label=ref)
    return source


def _open_adapter(folder: Path, base: Source | None, ref: str) -> Source:
    if base is None:
        raise NoBaseError(f"{ref}: a LoRA adapter, which needs a base model; give one under `base`")
    from weightsmith.io.read.peft import AdapterSource

    return AdapterSource(folder, base)


def _cached_folder(name: str, revision: str | None, cache: Path | None) -> Path | None:
    """The snapshot of a revision in the cache, if it holds a whole model or adapter."""
    import huggingface_hub

    for file in (*_CONFIGS, ADAPTER_CONFIG, "model.safetensors", f"model.safetensors{INDEX}"):
        found = huggingface_hub.try_to_load_from_cache(name, file, cache_dir=cache, revision=revision)
        if isinstance(found, str):
            folder = Path(found).parent
            with contextlib.suppress(SourceError):
                if not (folder / ADAPTER_CONFIG).exists():
                    FolderSource(folder)
                return folder
    return None


class _UnreachableError(SourceError):
    """No answer from the hub at all."""


@contextlib.contextmanager
def _hub_errors(what: str, revision: str | None, endpoint: str | None) -> Iterator[None]:
    """Turn whatever the hub's library raises into one line."""
    from huggingface_hub import constants, errors

    try:
        yield
    except SourceError:
        raise
    except errors.GatedRepoError:
        raise SourceError(
            f"{what}: access is restricted; ask for it on its hub page, then run: hf auth login"
        ) from None
    except errors.RepositoryNotFoundError:
        raise SourceError(f"{what}: no such model on the hub (or a private one: run hf auth login)") from None
    except errors.RevisionNotFoundError:
        raise SourceError(f"{what}: no revision {revision!r} on the hub") from None
    except (errors.HfHubHTTPError, errors.HFValidationError) as error:
        raise SourceError(f"{what}: the hub refused ({said(error)})") from None
    except errors.OfflineModeIsEnabled:
        raise _UnreachableError(
            f"{what}: not in the local cache, and HF_HUB_OFFLINE is set; unset it, or give a local folder"
        ) from None
    except Exception as error:  # the HTTP library below (requests, httpx) differs between versions of the hub's
        raise _UnreachableError(
            f"{what}: not in the local cache, and the hub at {public(endpoint or constants.ENDPOINT)} cannot be "
            f"reached ({said(error)}); check the network, or give a local folder"
        ) from None
