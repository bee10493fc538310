"""`python -m vlcore.demo`: fetch, build, train three stages, measure after each, report."""

import argparse
import sys
from pathlib import Path
from time import perf_counter

from tokenizers import Tokenizer

from vlcore import config
from vlcore.demo import build, machine, recipe, report
from vlcore.demo.fetch import PACKAGES, FetchError, fetch
from vlcore.demo.measure import Answer, Examiner, Measurement
from vlcore.models import DeepSeekVL, init_weights
from vlcore.processing import ChatTemplate, Processor
from vlcore.train import Stage, StageResult, train

SHOWN_FLAGS, SHOWN_PAGES = 30, 6


def main(argv: list[str] | None = None) -> int:
    """Run the demo; `argv` defaults to the process's arguments. Returns the exit status."""
    arguments = _parser().parse_args(argv)
    try:
        folders = fetch(arguments.data / "packages")
        if not arguments.fetch_only:
            sizes, lengths = (build.QUICK, recipe.QUICK) if arguments.quick else (build.Sizes(), recipe.Lengths())
            run(folders, arguments.data, arguments.out, seed=arguments.seed, sizes=sizes, lengths=lengths)
    except FetchError as error:
        print(f"vlcore.demo: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m vlcore.demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="where the report and the model go")
    parser.add_argument("--data", type=Path, default=Path("data/demo"), help="where the data is kept")
    parser.add_argument("--seed", type=int, default=0, help="decides data, weights and draws")
    parser.add_argument("--quick", action="store_true", help="a few steps on little data, to see that it runs")
    parser.add_argument("--fetch-only", action="store_true", help="bring the packages here, and stop")
    return parser


def run(
    folders: dict[str, Path], data_dir: Path, out: Path, *, seed: int, sizes: build.Sizes, lengths: recipe.Lengths
) -> list[dict]:
    """Everything behind the fetching: build, train, measure, report.

    Args:
        folders: {package: its files}, of `fetch`.
        data_dir: where the data is built.
        out: where report, pictures, metrics and model are written.
        seed: decides data, weights and draws.
        sizes, lengths: how much data, and how many steps.

    Returns:
        The stages as report.json has them.
    """
    model_config = config.demo()
    _say("building pictures and texts")
    data = build.build(folders, data_dir, model_config, sizes, seed)
    processor = Processor(Tokenizer.from_file(str(data.root / "tokenizer.json")), model_config, ChatTemplate(system=""))
    model = DeepSeekVL(model_config)
    init_weights(model, seed)
    examiner = Examiner(data, seed)
    _, cpu_flags = machine.read_cpu()
    precision = machine.fast_precision(cpu_flags)
    out.mkdir(parents=True, exist_ok=True)
    rows: list[dict] = []
    answers: list[Answer] = []

    def measure(name: str, seconds: float = 0.0, samples_per_second: float = 0.0) -> None:
        began = perf_counter()
        measured, said = examiner.examine(model, processor)
        rows.append(report.stage_row(name, measured, seconds, samples_per_second))
        answers[:] = said
        _tell(rows[-1], measured, perf_counter() - began)

    def after_stage(stage: Stage, model: DeepSeekVL, processor: Processor, result: StageResult) -> None:
        measure(stage.name, result.seconds, result.samples_per_second)

    measure("start")
    run_config = recipe.make_config(
        data, model_config, lengths, out, seed=seed, precision=precision, on_stage_end=after_stage
    )
    train(run_config, model, processor)
    shown = answers[: len(examiner.flags)], answers[len(examiner.flags) :]
    report.draw_samples(shown, out / "samples.png", tiles=(SHOWN_FLAGS, SHOWN_PAGES), seed=seed)
    found = {
        "seed": seed,
        "data": report.describe_data(PACKAGES, data.counts),
        "machine": machine.describe(precision),
        "stages": rows,
    }
    report.write_report(out, found, sum(parameter.numel() for parameter in model.parameters()))
    _say(f"written to {out}")
    return rows


def _tell(row: dict, measured: Measurement, seconds: float) -> None:
    numbers = ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in measured.as_dict().items())
    _say(f"{row['name']} ({row['seconds']:g} s, {row['samples_per_second']:g} samples/s): {numbers}; {seconds:.0f} s")


def _say(text: str) -> None:
    print(f"demo: {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
