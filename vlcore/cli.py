"""The command line: vlcore info | train | chat | bench."""

import argparse
import json
import sys
from pathlib import Path

import vlcore
from vlcore import config, layouts


def main(argv: list[str] | None = None) -> int:
    """Run one command; `argv` defaults to the process's arguments. Returns the exit status.

    What the user got wrong is one line on standard error and status 2; a failure of ours is a traceback.
    """
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except (ValueError, OSError) as error:
        print(f"vlcore {arguments.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vlcore", description="DeepSeek-VL on compiled kernels.")
    parser.add_argument("--version", action="version", version=f"vlcore {vlcore.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_info(commands.add_parser("info", help="parameters, FLOPs and memory of a model, or its table of weights"))
    _add_train(commands.add_parser("train", help="run the training that a Python function describes"))
    _add_chat(commands.add_parser("chat", help="talk to a model about images"))
    _add_bench(commands.add_parser("bench", help="time operators or models beside what else a user would run"))
    return parser


def _add_info(parser: argparse.ArgumentParser) -> None:
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--preset", default="deepseek_vl_7b", help=f"one of {', '.join(config.PRESETS)}")
    model.add_argument("--model", type=Path, metavar="DIR", help="a model directory, in either public layout")
    parser.add_argument("--weights", choices=layouts.LAYOUTS, help="print the weights of that layout, key and shape")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_info)


def _info(arguments: argparse.Namespace) -> int:
    from vlcore import costs

    chosen = layouts.read_config(arguments.model) if arguments.model else config.preset(arguments.preset)
    if arguments.weights:
        table = layouts.weight_table(chosen, arguments.weights)
        lines = (f"{key}  {'×'.join(map(str, shape))}" for key, shape in table.items())
        print(json.dumps(table, indent=1) if arguments.json else "\n".join(lines))
    else:
        description = costs.describe(chosen)
        print(json.dumps(description, indent=1) if arguments.json else costs.render(description))
    return 0


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("function", metavar="FILE.py:FUNCTION", help="a function that returns a TrainConfig")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="fields to change, such as stages.0.steps=10")
    parser.set_defaults(run=_train)


def _train(arguments: argparse.Namespace) -> int:
    from vlcore.train import run_file

    return run_file(arguments.function, arguments.overrides)


def _add_chat(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="a model directory")
    parser.add_argument("--image", type=Path, action="append", default=[], metavar="FILE", help="may be given again")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default)")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--repetition-penalty", type=float, default=1.0)
    parser.add_argument("--seed", type=int)
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="one question; without it, a conversation")
    parser.set_defaults(run=_chat)


def _chat(arguments: argparse.Namespace) -> int:
    from vlcore import chat

    return chat.run(
        arguments.model,
        arguments.image,
        arguments.prompt,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        repetition_penalty=arguments.repetition_penalty,
        seed=arguments.seed,
    )


def _add_bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("operators", nargs="*", metavar="OP", help="operators of vlcore.ops (default: all)")
    parser.add_argument(
        "--model",
        action="append",
        default=[],
        choices=("vision", "prefill", "decode", "train"),
        help="a part of a model end to end, beside transformers; may be given again",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", action="append", default=[], choices=("bfloat16", "float32", "float16", "tf32"))
    parser.add_argument("--overhead", action="store_true", help="what calls of operators cost the host")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out of the peers")
    parser.add_argument("--json", type=Path, metavar="FILE", help="add the results to this file")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw a roofline and ratios, such as bench.png")
    parser.set_defaults(run=_bench)


def _bench(arguments: argparse.Namespace) -> int:
    from vlcore.bench import command

    command.run(
        arguments.operators,
        arguments.model,
        device=arguments.device,
        dtypes=arguments.dtype,
        overhead=arguments.overhead,
        compiled=not arguments.no_compile,
        json_file=arguments.json,
        plot_file=arguments.plot,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
