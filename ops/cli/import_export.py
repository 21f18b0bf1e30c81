"""``aurora versions import`` and ``aurora versions export``: exchange drafts with other projects."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from ops.cli.terminal import (
    AsJson,
    Config,
    DryRun,
    Set,
    echo,
    echo_json,
    load_settings,
    new_table,
    open_tables,
    user_errors,
)
from ops.cli.versions import LineOption, connect_registry, find_line, find_version
from schemas.errors import UserError
from schemas.settings import Settings

if TYPE_CHECKING:
    from schemas.speculator.layouts import Layout
    from trainer.release.draft_import import ImportedDraft
    from trainer.release.evaluation import HeldOutEvaluator
    from trainer.release.gate import HeldOutComparison
    from trainer.release.registration import Registrar

_MODELS = "models:/"


def import_(
    source: Annotated[str, typer.Argument(metavar="PATH|models:/NAME@ALIAS", help="Folder, or a model in MLflow.")],
    config: Config = None,
    set_: Set = None,
    format_: Annotated[
        str | None,
        typer.Option("--format", metavar="FORMAT", help="sglang, vllm or speculators. Default: by the folder's keys."),
    ] = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Register an EAGLE-3 draft of SpecForge, SGLang, vLLM or speculators as a version."""
    with user_errors(), _failures():
        from schemas.telemetry import logs
        from trainer.release.draft_import import check_draft
        from trainer.release.evaluation import HeldOutEvaluator
        from trainer.release.registration import Registrar

        logs.configure("import", "warning")
        settings, layout = load_settings(config, set_), _parse_layout(format_)
        registry = connect_registry(settings)
        with tempfile.TemporaryDirectory() as folder:
            imported = check_draft(settings, _fetch(settings, source, Path(folder)), layout)
        evaluator = HeldOutEvaluator(settings, imported.target, registry)
        registrar = Registrar(settings, imported.target, registry, evaluator)
        held_out, unscored = _score(settings, imported, registrar, evaluator)
        version, is_candidate = None, False
        if not dry_run:
            version, is_candidate = _register(settings, imported, registrar, held_out, source)
        report = {
            "line": imported.target.line,
            "line_of_settings": imported.of_settings,
            "target": imported.target.fingerprint,
            "format": imported.layout,
            "shape": imported.shape,
            "held_out": held_out.model_dump(mode="json") if held_out else None,
            "unscored": unscored,
            "version": version,
            "candidate": is_candidate,
            "next": _next_step(imported, version, is_candidate=is_candidate),
        }
        if as_json:
            echo_json(report)
            return
        _print_import(report, held_out)


def export(
    version: Annotated[str, typer.Argument(help="Number or alias.")],
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="New or empty folder.")],
    config: Config = None,
    set_: Set = None,
    line: LineOption = None,
    format_: Annotated[
        str, typer.Option("--format", metavar="FORMAT", help="sglang (also for SpecForge), vllm or speculators.")
    ] = "sglang",
    target: Annotated[
        str | None, typer.Option("--target", metavar="NAME", help="Target that the card names. Default: target.path.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a version as SGLang, SpecForge, vLLM or speculators load it, with a model card."""
    with user_errors(), _failures():
        from schemas.speculator.checkpoint import read_checkpoint
        from schemas.speculator.day_0_draft import read_config
        from schemas.speculator.layouts import Verifier
        from trainer.release.draft_export import export_version, find_ancestors, load_command

        settings = load_settings(config, set_)
        layout = _parse_layout(format_)
        assert layout is not None
        if to.exists() and (not to.is_dir() or any(to.iterdir())):
            raise UserError(f"--to {to}: not an empty folder; name a new one")
        registry = connect_registry(settings)
        of = find_line(settings, registry, line)
        found = find_version(registry, of, version)
        target_folder = Path(settings.target.path)
        architectures = tuple(read_config(target_folder).get("architectures") or ())
        verifier = Verifier(
            target or str(target_folder.resolve()), architectures, settings.serve.num_speculative_tokens
        )
        with tempfile.TemporaryDirectory() as folder:
            draft = read_checkpoint(registry.download(of.name, found.number, Path(folder)), of.name)
        ancestors = find_ancestors(found, registry.versions(of.name))
        export_version(settings, draft, found, ancestors, to, layout, verifier)
        command = load_command(layout, str(to), verifier)
        if as_json:
            files = sorted(path.name for path in to.iterdir())
            echo_json({"line": of.name, "version": found.number, "format": layout, "files": files, "serve": command})
            return
        echo(f"version {found.number} of line {of.name} is in {to}; serve it with")
        echo(f"  {command}")


@contextmanager
def _failures() -> Iterator[None]:
    from schemas.speculator.checkpoint import CheckpointError
    from trainer.release.registry import RegistryError

    try:
        yield
    except (CheckpointError, RegistryError, OSError) as error:
        raise UserError(str(error)) from error


def _parse_layout(named: str | None) -> Layout | None:
    from schemas.speculator.layouts import LAYOUTS

    found = next((layout for layout in LAYOUTS if layout == named), None)
    if named is not None and found is None:
        raise UserError(f"--format {named}: expected {', '.join(LAYOUTS)}; SpecForge's is sglang")
    return found


def _fetch(settings: Settings, source: str, folder: Path) -> Path:
    """Return the folder of a draft; of a model in MLflow, after its download below ``folder``."""
    if not source.startswith(_MODELS):
        if not Path(source).is_dir():
            raise UserError(f"{source}: no such folder; name a folder, or a model as {_MODELS}NAME@ALIAS")
        return Path(source)
    from schemas.registry_client import FAILURES, download_model

    try:
        return download_model(settings.registry, source.removeprefix(_MODELS), folder)
    except FAILURES as error:
        raise UserError(f"{source}: {error}; see registry.tracking_uri {settings.registry.tracking_uri}") from error
    except ValueError as error:
        raise UserError(f"{source}: {error}") from error


def _score(
    settings: Settings, imported: ImportedDraft, registrar: Registrar, evaluator: HeldOutEvaluator
) -> tuple[HeldOutComparison | None, str | None]:
    """Compare the draft with the champion on recorded requests; or return why it was not."""
    from trainer.release.draft_import import read_held_out

    try:
        samples = read_held_out(open_tables(settings), settings, imported)
    except UserError as error:
        return None, str(error)
    if not samples:
        return None, f"tables.uri holds no held-out requests of this target and line {imported.rows_line}"
    return registrar.compare(evaluator.evaluate(imported.draft, samples)), None


def _register(
    settings: Settings, imported: ImportedDraft, registrar: Registrar, held_out: HeldOutComparison | None, source: str
) -> tuple[str, bool]:
    from trainer.release.draft_import import IMPORTED_FORMAT_TAG, IMPORTED_FROM_TAG, render_imported_card

    name = source if source.startswith(_MODELS) else str(Path(source).resolve())
    tags = {IMPORTED_FROM_TAG: name, IMPORTED_FORMAT_TAG: imported.layout}
    card = render_imported_card(settings, imported, name, held_out)
    return registrar.register_imported(imported.draft, held_out, tags, card)


def _next_step(imported: ImportedDraft, version: str | None, *, is_candidate: bool) -> str:
    """Return what serves the draft."""
    if version is None:
        return "run the command without --dry-run"
    if not imported.of_settings:
        layout = "vllm" if imported.draft.shape.norm_before_residual else "sglang"
        export = f"aurora versions export {version} --line {imported.target.line} --format {layout} --to DIR"
        return f"`{export}`, and set speculator.day_0_folder to DIR on nodes and trainer, which begin this line with it"
    if is_candidate:
        return f"the promoter decides about it; `aurora versions promote {version}` does not wait for it"
    return f"`aurora versions promote {version} --force` serves it"


def _print_import(report: dict[str, Any], held_out: HeldOutComparison | None) -> None:
    shape = report["shape"]
    score = f"not scored: {report['unscored']}"
    if held_out is not None:
        score = f"acceptance length {1 + held_out.accepted_per_step:.3f} on {held_out.samples} samples"
        if report["line_of_settings"]:  # another line begins with the draft itself
            champion = f"{1 + held_out.champion_accepted_per_step:.3f} of {held_out.champion}"
            score += f"; {champion}, {held_out.interval}"
    table = new_table("check", "found")
    for name, value in (
        ("format", report["format"]),
        ("line", f"{report['line']}, {'that' if report['line_of_settings'] else 'not that'} of the settings"),
        ("target", f"fits {report['target']}"),
        ("draft", f"{shape['variant']}, hidden {shape['hidden_size']}, MLP {shape['intermediate_size']}"),
        ("draft vocabulary", f"{shape['draft_vocab_size']} of {shape['vocab_size']} tokens"),
        ("captured layers", f"outputs of {', '.join(map(str, shape['capture_layers']))}"),
        ("held-out requests", score),
    ):
        table.add_row(name, value)
    Console().print(table)
    done = f"registered version {report['version']}" if report["version"] else "nothing was registered"
    echo(f"{done}{', the candidate' if report['candidate'] else ''}: {report['next']}")
