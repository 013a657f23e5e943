"""An adapter in another format: what `rankwise convert` does."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rankwise.adapters.lowrank import SiteShape
from rankwise.errors import AdapterFileError, ModelError, RunFolderError, SpecError, nearest
from rankwise.formats import vllm
from rankwise.formats.component import checked_component
from rankwise.formats.portable import DTYPES, Layer, Outline, Portable, Terms
from rankwise.formats.record import describe, read_record, write_record
from rankwise.formats.table import FORMATS, WRITTEN, Format, found_format
from rankwise.frozen.load import load_base, read_outline
from rankwise.jobs.evaluate import trained_task
from rankwise.jobs.place import whole_folder
from rankwise.jobs.watch import Watch
from rankwise.planning.headers import read_headers
from rankwise.surgery.sites import find_sites

SERVERS = ("vllm",)


@dataclass(frozen=True)
class Conversion:
    """What is asked for beside source and target; as `rankwise convert --help` says."""

    model: str | None = None
    component: str = ""
    alpha: float | None = None
    enable_lora: tuple[bool, ...] = ()
    server: str | None = None
    rank: int | None = None
    dtype: str = "f32"


def run_conversion(source: Path, to: str | None, out: Path, watch: Watch, asked: Conversion) -> dict[str, Any]:
    """Writes an adapter in another format, read back and compared; nothing of it is lost in silence.

    Args:
        source: a folder or a file; its format is found out by looking.
        to: one of the formats that are written; by default `peft` for a server.
        out: a folder for PEFT and mlx-lm, else a file; must be new.

    Returns:
        `from`, `to`, `out`, `layers`, `parameters`, `ranks` (path → rank), `error`: ‖ΔW - ΔW'‖ / ‖ΔW‖ over all layers,
        from the number format and, of form dora for a server, from what plain LoRA cannot say; `errors` then has it by
        rank; `notes`, what was taken for granted; `use`, the commands that take it.

    Raises:
        AdapterFileError: the source cannot be read, or the target cannot hold all of it; everything at once.
        ModelError: a model is needed and none was said, or it cannot be read.
        SpecError: options that make no sense.
        RunFolderError: `out` exists, or cannot be written.
    """
    source, out = source.expanduser(), out.expanduser().resolve()
    target = _target(to, asked)
    _check_place(out, target)
    origin, path = found_format(source)
    outline = _outline(asked, origin, path, target)
    terms = Terms(outline, asked.component, asked.alpha, asked.enable_lora, DTYPES[asked.dtype])
    with watch.stage(f"reading {source}"):
        read = origin.read(path, terms)
    if not (read.adapter.sites or read.adapter.modules or read.adapter.tokens):
        raise AdapterFileError(f"{source}: no direction is left at any layer; there is nothing to convert")
    served, errors, lost = _for_server(read, trained_task([path] if origin.name == "peft" else []), asked, watch)
    with watch.stage(f"writing {out}"):
        error, component = _written(target, out, served, terms, read_record(path) if origin.name == "peft" else None)
    ranks = {site: factors.rank for site, factors in served.adapter.sites.items()}
    return {
        "from": origin.name,
        "to": target.name,
        "out": str(out),
        "for": asked.server,
        "component": component or None,
        "layers": len(ranks),
        "parameters": served.adapter.parameter_count(),
        "ranks": ranks,
        "error": max(error, lost),
        "errors": {str(rank): value for rank, value in errors.items()},
        "notes": list(read.notes),
        "use": _use(target, asked, out, outline.name if outline is not None else served.base or "MODEL", ranks),
    }


def _target(to: str | None, asked: Conversion) -> Format:
    """What is to be written, if the options go together.

    Raises:
        SpecError: they do not; everything that is wrong.
    """
    to = to or ("peft" if asked.server else None)
    problems = []
    if to not in WRITTEN:
        near = nearest(to, WRITTEN) if to else ""
        problems.append(
            (f"no format {to!r} to write{near}" if to else "to which format?", f"--to {' | '.join(WRITTEN)}")
        )
    if asked.server is not None and asked.server not in SERVERS:
        problems.append((f"no server {asked.server!r}", f"--for {' or '.join(SERVERS)}"))
    if asked.server is not None and to in WRITTEN and to != "peft":
        problems.append((f"{asked.server} takes folders of PEFT, not {to}", "leave --to out"))
    if asked.rank is not None and not (asked.server and 1 <= asked.rank <= vllm.MAX_LORA_RANKS[-1]):
        problems.append(
            (
                "--rank is that of the plain LoRA which stands for a DoRA",
                f"with --for vllm, 1 to {vllm.MAX_LORA_RANKS[-1]}",
            )
        )
    if asked.dtype not in DTYPES:
        problems.append((f"no number format {asked.dtype!r}", f"--dtype {' | '.join(DTYPES)}"))
    if asked.alpha is not None and not asked.alpha > 0:
        problems.append((f"alpha {asked.alpha}: must be above 0", "--alpha, as it was in training"))
    if problems:
        raise SpecError("; ".join(said for said, _ in problems), hint="; ".join(hint for _, hint in problems))
    checked_component(asked.component)
    return FORMATS[str(to)]


def _check_place(out: Path, target: Format) -> None:
    """That a file of this name can be made; folders are looked at when they are written."""
    if target.suffix and out.suffix != target.suffix:
        raise SpecError(f"{out}: a file of {target.name} ends in {target.suffix}", hint=f"--out NAME{target.suffix}")
    if target.suffix and out.exists():
        raise RunFolderError(f"{out}: exists; nothing was overwritten", hint="choose another --out")


def _outline(asked: Conversion, origin: Format, path: Path, target: Format) -> Outline | None:
    """Of the model that was said, or, where a format cannot do without, of the one that the adapter's config names."""
    name = asked.model
    if name is None and (origin.of_model or target.of_model) and origin.name in ("peft", "mlx"):
        name = origin.read(path, Terms()).base or None
    if name is None and (origin.of_model or target.of_model):
        which = origin.name if origin.of_model else target.name
        raise ModelError(f"the names of layers in {which} depend on the model", hint="say which: --model PATH_OR_ID")
    return None if name is None else outline_of(name, asked.component)


def outline_of(name: str, component: str = "") -> Outline:
    """A model without its weights: one of transformers, or of diffusers by the headers of its files.

    Args:
        name: a folder or an id on the hub; or the folder of a pipeline, of which `component` says one model.

    Raises:
        ModelError: it cannot be read.
    """
    folder = Path(name).expanduser()
    if component and (folder / component).is_dir():
        folder = folder / component
    elif (folder / "model_index.json").exists():
        raise ModelError(f"{name}: a pipeline of several models", hint="say which: --component unet, for example")
    if folder.is_dir() and component and not component.startswith("text"):
        headers = {key.removesuffix(".weight"): one.shape for key, one in read_headers(folder).items()}
        layers = {path: _seen(shape) for path, shape in headers.items() if len(shape) > 1}
        return Outline(str(folder), "", {}, layers)
    model = read_outline(folder if folder.is_dir() else name)
    config = model.config.get_text_config()
    layers = {path: Layer(site.kind.name, site.shape) for path, site in find_sites(model).items()}
    tied = bool(getattr(config, "tie_word_embeddings", False))
    return Outline(str(name), str(model.config.model_type), config.to_dict(), layers, tied)


def _seen(shape: tuple[int, ...]) -> Layer:
    """A layer by its weight's shape alone."""
    kind = "linear" if len(shape) == 2 else "convolution"
    return Layer(kind, SiteShape(shape[0], shape[1], shape[2:]))


def _for_server(
    read: Portable, task: str, asked: Conversion, watch: Watch
) -> tuple[Portable, Mapping[int, float], float]:
    """The adapter as a server takes it; errors by rank and the one at hand where DoRA became plain."""
    if asked.server is None:
        return read, {}, 0.0
    vllm.check_served(read)
    magnitudes = {path: own.rank for path, own in read.adapter.sites.items() if own.m is not None}
    if not magnitudes:
        return vllm.served(read), {}, 0.0
    if asked.model is None:
        raise ModelError(
            "vLLM serves no DoRA, and to say it in plain LoRA takes the weights of its base",
            hint="--model PATH_OR_ID; or train with --form lora, or merge it (rankwise merge)",
        )
    rank = asked.rank or vllm.max_lora_rank(magnitudes)
    with watch.stage(f"loading {asked.model}"):
        base = load_base(asked.model, dtype="float32", device="cpu", task=task)
    sites = find_sites(base.model)
    missing = [path for path in magnitudes if path not in sites]
    if missing:
        raise AdapterFileError(f"{asked.model} has no layer {missing[0]!r}", hint="is it the adapter's base?")
    with watch.stage(f"finding plain LoRA of rank {rank}") as advance:
        made = vllm.plain(read, lambda path: sites[path].kind.weight(sites[path].module), rank, advance)
    return vllm.served(made.portable), made.errors, made.error


def _written(
    target: Format, out: Path, portable: Portable, terms: Terms, record: dict[str, Any] | None
) -> tuple[float, str]:
    """Writes, reads back and compares; what differs by more than rounding is not left behind.

    Returns:
        How far ΔW is off, and the model of a pipeline that it belongs to.
    """
    _write(target, out, portable, terms, record)
    try:
        back = target.read(out, terms)
        return _rounding(portable, back, out, terms.dtype), back.component or portable.component
    except AdapterFileError:
        shutil.rmtree(out) if out.is_dir() else out.unlink()
        raise


def _write(target: Format, out: Path, portable: Portable, terms: Terms, record: dict[str, Any] | None) -> None:
    assert target.write is not None
    if target.suffix:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            target.write(out, portable, terms)
        except OSError as error:
            raise RunFolderError(
                f"{out}: cannot be written: {error}", hint="make room, or choose another --out"
            ) from None
        return
    with whole_folder(out) as place:
        target.write(place, portable, terms)
        if record is not None and target.name == "peft":
            write_record(place, _carried(record, target.read(place, Terms())))


def _carried(record: dict[str, Any], portable: Portable) -> dict[str, Any]:
    """The record of the adapter that was read, with what is now written in the places of what was."""
    return record | describe(portable.adapter, record["base"], {})


@torch.no_grad()
def _rounding(portable: Portable, back: Portable, out: Path, dtype: torch.dtype) -> float:
    """‖ΔW - ΔW'‖ / ‖ΔW‖ over all layers of what was read back.

    Raises:
        AdapterFileError: it is further off than the number format explains.
    """
    sites = back.adapter.sites
    if sites.keys() != portable.adapter.sites.keys():
        raise AdapterFileError(f"{out}: read back, it has other layers than were written")
    missed, whole = 0.0, 0.0
    for path, own in portable.adapter.sites.items():
        other = sites[path]
        A = torch.cat([own.A.detach(), other.A.detach()]).double()
        B = torch.cat([own.scale * own.B.detach(), -other.scale * other.B.detach()], dim=1).double()
        small = torch.linalg.qr(B.flatten(1)).R @ torch.linalg.qr(A.flatten(1).t()).R.t()  # as large as their product
        missed += float(small.square().sum())
        whole += own.delta_norm() ** 2
    error = (missed / whole) ** 0.5 if whole else 0.0
    allowed = {torch.float32: 1e-6, torch.float16: 1e-2, torch.bfloat16: 2e-2}[dtype]
    if error > allowed:
        raise AdapterFileError(
            f"{out}: read back, ΔW is off by {error:.2g}, more than its number format explains",
            hint="--dtype f32 rounds least",
        )
    return error


def _use(target: Format, asked: Conversion, out: Path, model: str, ranks: Mapping[str, int]) -> list[str]:
    """What a person types next."""
    place, base = shlex.quote(str(out)), shlex.quote(model)
    if asked.server == "vllm":
        name = shlex.quote(f"{out.name}={out}")
        most = vllm.max_lora_rank(ranks)
        return [f"vllm serve {base} --enable-lora --max-lora-rank {most} --lora-modules {name}"]
    return {
        "peft": [f"rankwise inspect {place}"],
        "gguf": [f"llama-cli -m MODEL.gguf --lora {place}", f"llama-server -m MODEL.gguf --lora {place}"],
        "mlx": [f"mlx_lm.generate --model {base} --adapter-path {place} --prompt PROMPT"],
        "diffusers": [f"pipeline.load_lora_weights({str(out.parent)!r}, weight_name={out.name!r})"],
        "kohya": [f"pipeline.load_lora_weights({str(out.parent)!r}, weight_name={out.name!r})"],
    }[target.name]
