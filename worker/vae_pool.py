"""Loaded VAEs: from the catalogue's weights to a module on the device, kept until memory is needed.

Weights come from a folder or a Hugging Face repo, as safetensors only and without any code from there. One
decode at a time runs on a VAE (`LoadedVae.lock`): some keep decode state on the module.

DESIGN. Any thread may ask for a VAE; one load runs at a time, and others who ask wait for it. Nobody else does: a
device that is short of memory evicts while a large VAE is being read from a slow disk. A VAE somebody holds is not
evicted: eviction only drops the pool's reference, the memory goes when the last user is done.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import diffusers
import torch
from huggingface_hub import snapshot_download

from broker_config.errors import OutOfMemory, WeightsMismatch, WeightsMissing, WorkerError
from broker_config.vae_catalog import VaeCatalog, VaeEntry
from broker_config.vae_identity import config_digest
from worker.latent_io import torch_dtype
from worker.stages import classify

logger = logging.getLogger(__name__)

#: Weights that ship with latentq.
_OWN_WEIGHTS: Final[Mapping[str, Path]] = {"latentq:demo": Path(__file__).parent / "demo_vae"}
#: What is fetched of a repo: never pickles, never code, not the other precisions.
_WANTED = (
    "config.json",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model-*.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
)

#: What a disk or a full table says that may work later.
_PASSING: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.EIO, errno.EAGAIN, errno.ESTALE})


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedVae:
    """A VAE on its device."""

    entry: VaeEntry
    #: The diffusers autoencoder, in eval mode.
    module: Any
    dtype: torch.dtype
    device: torch.device
    #: Where the weights came from: repo or folder, revision, sha256 of the first file.
    weights: Mapping[str, str]
    #: Bytes of the parameters and buffers.
    size_bytes: int
    #: Held while it decodes.
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def half_suits(self) -> bool:
        """Whether the catalogue lets it decode in half precision."""
        return self.entry.dtype != "float32"


class VaePool:
    """VAEs by catalogue name, least recently used out first."""

    def __init__(
        self,
        catalog: VaeCatalog,
        *,
        device: torch.device,
        dtype: str | None = None,
        max_bytes: int | None = None,
    ) -> None:
        """Args:
        catalog: where the names are looked up.
        device: where modules go.
        dtype: overrides the catalogue's dtype.
        max_bytes: memory for loaded VAEs; None: no limit.
        """
        self._catalog = catalog
        self.device = device
        self._dtype = dtype
        self._max_bytes = max_bytes
        self._loaded: OrderedDict[str, LoadedVae] = OrderedDict()
        self._lock = threading.RLock()
        #: Held while a VAE is loaded; taken before `_lock`.
        self._loading = threading.Lock()

    def get(self, name: str) -> LoadedVae:
        """The VAE, loaded if it was not.

        Raises:
            UnknownVae: not in the catalogue.
            WeightsMissing: no weights where the catalogue says.
            WeightsMismatch: weights of another class or with other channels.
            OutOfMemory: there is too little memory for it now.
            WorkerError: the weights cannot be read now.
        """
        with self._loading:
            with self._lock:
                vae = self._loaded.get(name)
            if vae is None:
                vae = self._load(self._catalog[name])
            with self._lock:
                self._loaded[name] = vae
                self._loaded.move_to_end(name)
                self._shrink(keep=name)
            return vae

    def evict_all_but(self, name: str) -> int:
        """Drops every other VAE. Returns how many."""
        with self._lock:
            others = [other for other in self._loaded if other != name]
            for other in others:
                del self._loaded[other]
            return len(others)

    @property
    def is_full(self) -> bool:
        """Whether loading another VAE would evict one."""
        with self._lock:
            return self._max_bytes is not None and self._size_bytes() >= self._max_bytes

    def loaded(self) -> list[str]:
        """Names of the loaded VAEs, least recently used first."""
        with self._lock:
            return list(self._loaded)

    def _shrink(self, *, keep: str) -> None:
        while self._max_bytes is not None and len(self._loaded) > 1:
            if self._size_bytes() <= self._max_bytes:
                return
            oldest = next(name for name in self._loaded if name != keep)
            logger.info("evicting VAE %s", oldest, extra={"action": "vae_evicted", "vae": oldest})
            del self._loaded[oldest]

    def _size_bytes(self) -> int:
        return sum(vae.size_bytes for vae in self._loaded.values())

    def _load(self, entry: VaeEntry) -> LoadedVae:
        folder, revision = find_weights(entry)
        dtype = torch_dtype(self._dtype or default_dtype(entry, self.device))
        config = _checked_config(entry, folder)
        logger.info(
            "loading VAE %s from %s as %s",
            entry.name,
            folder,
            dtype,
            extra={"action": "vae_load", "vae": entry.name},
        )
        # Parameters keep `requires_grad`, as in a pipeline: torch's matmul folds a batch into one product only where
        # it is set (LinearAlgebra.cpp `should_fold`), also under inference_mode, and the last bits differ.
        module = _from_pretrained(entry, folder, dtype).to(self.device).eval()
        size = sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))
        if entry.tiled:
            module.enable_tiling()
        digest = config_digest(module.config)  # of the module: what the file leaves out has the class's default
        if entry.config_digest not in (None, digest):
            raise WeightsMismatch(
                f"the config of VAE {entry.name} has digest {digest}, the catalogue says {entry.config_digest}",
                field="config_digest",
            )
        weights = {
            "weights": entry.weights,
            "sha256": _digest(folder),
            "class": str(config["_class_name"]),
            "config": digest,
        }
        if revision:
            weights["revision"] = revision
        return LoadedVae(entry=entry, module=module, dtype=dtype, device=self.device, weights=weights, size_bytes=size)


def _from_pretrained(entry: VaeEntry, folder: Path, dtype: torch.dtype) -> Any:
    try:
        return getattr(diffusers, entry.vae_class).from_pretrained(
            str(folder),
            torch_dtype=dtype,
            use_safetensors=True,
            low_cpu_mem_usage=False,  # the other way needs accelerate, which saves nothing at the size of a VAE
        )
    except (OSError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        # OSError: a file cut off; RuntimeError: shapes of another VAE; the others: a config the class does not take.
        reason = str(error).strip().splitlines()[0][:300]
        if isinstance(classify(error), OutOfMemory):
            raise OutOfMemory(f"VAE {entry.name} cannot be loaded now ({type(error).__name__}: {reason})") from error
        if getattr(error, "errno", None) in _PASSING:
            raise WorkerError(f"VAE {entry.name} cannot be loaded now ({type(error).__name__}: {reason})") from error
        raise WeightsMismatch(
            f"the weights of VAE {entry.name} in {folder} cannot be loaded as {entry.vae_class} "
            f"({type(error).__name__}: {reason}): fetch them again, or correct [{entry.name}] in the catalogue",
            field="weights",
        ) from error


def can_tile(module: Any) -> bool:
    """Whether `enable_tiling` changes how a VAE decodes: some classes raise, some set flags that nothing reads."""
    return hasattr(module, "tiled_decode") or hasattr(module, "_tiled_decode")


def default_dtype(entry: VaeEntry, device: torch.device) -> str:
    """The dtype a VAE is loaded in: the catalogue's on CUDA, float32 on a CPU."""
    if device.type == "cpu":
        return "float32"
    if entry.dtype == "auto":
        return "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float16"
    return entry.dtype


def find_weights(entry: VaeEntry) -> tuple[Path, str | None]:
    """Folder with the entry's config and weights, and the commit it is of; fetched from the hub if need be.

    Raises:
        WeightsMissing: neither there nor to be had.
    """
    if entry.weights in _OWN_WEIGHTS:
        folder, revision = _OWN_WEIGHTS[entry.weights], None
    elif Path(entry.weights).is_absolute():
        folder, revision = Path(entry.weights), entry.revision
    else:
        folder, revision = _fetch(entry)
    if entry.subfolder:
        folder = folder / entry.subfolder
    if not (folder / "config.json").is_file() or not _weight_files(folder):
        raise WeightsMissing(
            f"no safetensors weights for VAE {entry.name} in {folder}: check `weights` and `subfolder` of "
            f"[{entry.name}] in the catalogue; the folder needs config.json and diffusion_pytorch_model.safetensors",
            field="weights",
        )
    return folder, revision


def _fetch(entry: VaeEntry) -> tuple[Path, str]:
    prefix = f"{entry.subfolder}/" if entry.subfolder else ""
    patterns = [prefix + name for name in _WANTED]
    try:
        path = snapshot_download(entry.weights, revision=entry.revision, allow_patterns=patterns)
    except Exception as error:  # the hub client has no common base class for "cannot be had"
        raise WeightsMissing(
            f"the weights of VAE {entry.name} ({entry.weights}) are neither in the Hugging Face cache nor to be had "
            f"from the hub ({type(error).__name__}): fetch them once with network, or name a local folder as "
            f"`weights` of [{entry.name}] in your catalogue",
            field="weights",
        ) from error
    return Path(path), Path(path).name


def _weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("diffusion_pytorch_model*.safetensors"))


def _checked_config(entry: VaeEntry, folder: Path) -> Mapping[str, Any]:
    try:
        config: Mapping[str, Any] = dict(json.loads((folder / "config.json").read_text(encoding="utf-8")).items())
    except (ValueError, AttributeError) as error:
        raise WeightsMismatch(f"config.json of VAE {entry.name} in {folder} is no JSON object: {error}") from error
    found = config.get("_class_name")
    if found != entry.vae_class:
        raise WeightsMismatch(
            f"the weights of VAE {entry.name} are of class {found}, the catalogue says {entry.vae_class}",
            field="vae_class",
        )
    channels = config.get("latent_channels") or config.get("z_dim")
    if channels is not None and channels != entry.channels:
        raise WeightsMismatch(
            f"the weights of VAE {entry.name} have {channels} latent channels, the catalogue says {entry.channels}",
            field="channels",
        )
    return config


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in _weight_files(folder):
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
