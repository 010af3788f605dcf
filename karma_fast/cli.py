"""The `karma-fast` command: arguments in, one of a few exit codes out. Heavy packages load when a command runs."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
import traceback
from functools import partial
from importlib import import_module

from . import __version__
from .config import MOST_REQUESTS, ConfigError, DataConfig, KarmaConfig

STARTED = time.perf_counter()  # what a run reports as its time includes the loading of packages

EXIT_CODES = """exit codes:
  0    done
  1    what was asked for failed: bad data, training not possible, no such model, user or item, out of memory
  2    wrong usage or configuration, such as an unknown setting
  130  stopped by Ctrl-C"""


def main(argv: list[str] | None = None) -> int:
    """Runs one command; the exit code. Usage errors of argparse raise SystemExit(2).

    >>> main(["train", "missing.yaml", "--learnin_rate", "1e-4"])
    2
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser, commands = build_parser()
    show_traceback = "--traceback" in argv
    argv = [word for word in argv if word != "--traceback"]
    name = next((word for word in argv if not word.startswith("-")), None)
    try:
        overrides = {}
        if name in commands and commands[name].get_default("takes_settings"):
            argv, overrides = split_settings(argv, commands[name])
        args = parser.parse_args(argv)
        if name is None:
            parser.print_help()
            return 2
        args.overrides = overrides
        return import_module(f".commands.{args.module}", __package__).main(args)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe is gone, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if show_traceback:
            traceback.print_exc()
        code, text = explain(error)
        if text is None:  # a fault of the program: where it happened is all there is to say
            if not show_traceback:
                traceback.print_exc()
            return code
        print(f"error: {text}", file=sys.stderr)
        return code


def explain(error: Exception) -> tuple[int, str | None]:
    """(exit code, one message) of an error; None for the message of one that users cannot have caused."""
    text = str(error)
    if isinstance(error, ConfigError):
        return 2, text
    if isinstance(error, MemoryError) and text:
        return 1, text
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError) or "can't allocate memory" in text:
        return 1, f"out of memory: {text.splitlines()[0] if text else 'no memory left'}"
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("karma"):
        return 1, f"this command needs {error.name}, which is not installed; `karma-fast doctor` says how to get it"
    if isinstance(error, KeyError):
        # KeyErrors of this project bring a sentence; others bring the missing key alone
        return 1, error.args[0] if error.args and " " in str(error.args[0]) else None
    if isinstance(error, FileNotFoundError) and error.filename:
        return 1, f"{error.filename}: no such file or folder"
    if type(error).__name__ in ("DataError", "AssetError") or isinstance(error, FloatingPointError):
        return 1, text
    if isinstance(error, (ValueError, OSError, ImportError)):
        return 1, f"{text or type(error).__name__} (--traceback shows where)"
    return 1, None


def split_settings(argv: list[str], command: argparse.ArgumentParser) -> tuple[list[str], dict[str, str]]:
    """Takes the settings (``--key value``, ``--key=value``, ``--key`` for true) out of the words for argparse.

    The command's own options may be spelled with ``_`` too. A word that ends in .yaml or .yml is CONFIG.yaml, not the
    value of the setting before it.

    >>> parser = argparse.ArgumentParser()
    >>> _ = parser.add_argument("--resume", action="store_true")
    >>> split_settings(["--resume", "--model.positions", "last", "--bf16", "a.yaml"], parser)
    (['--resume', 'a.yaml'], {'model.positions': 'last', 'bf16': 'true'})
    """
    own = {option for action in command._actions for option in action.option_strings}
    rest, settings, at = [], {}, 0
    while at < len(argv):
        name, equals, value = argv[at].partition("=")
        at += 1
        option = name.replace("_", "-")
        if not name.startswith("--") or option in own or name == "--":
            rest.append(f"{option}{equals}{value}" if option in own else argv[at - 1])
            continue
        if not equals:
            value = "true"
            if at < len(argv) and not argv[at].startswith("--") and not argv[at].endswith((".yaml", ".yml")):
                value = argv[at]
                at += 1
        settings[name[2:].replace("-", "_")] = value
    return rest, settings


# ---- the parser --------------------------------------------------------------------------------------------------


def build_parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser and, by name, those of the commands."""
    parser = argparse.ArgumentParser(
        prog="karma-fast",
        description="Train an LLM to find the next item, with an embedding that stays decodable into text.",
        epilog=f"{EXIT_CODES}\n\n`karma-fast COMMAND --help` says more. Start with `karma-fast demo`.",
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"karma-fast {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    made: dict[str, argparse.ArgumentParser] = {}

    def add(name: str, module: str, summary: str, epilog: str, takes_settings=False) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".",
                                      epilog=f"{epilog}\n\n{EXIT_CODES}", allow_abbrev=False,
                                      formatter_class=argparse.RawDescriptionHelpFormatter)
        command.set_defaults(module=module, command=name, takes_settings=takes_settings)
        command.add_argument("--traceback", action="store_true", help="show where an error came from")
        made[name] = command
        return command

    demo = add("demo", "train", "train on MovieLens-100K with a 135M-parameter LLM, compare, and report",
               "examples:\n  karma-fast demo\n  karma-fast demo --max_steps 20 --output_dir runs/quick\n\n"
               "Any setting of `karma-fast train` can follow. An earlier demo in the same folder is replaced.", True)
    train = add("train", "train", "train a model as a YAML file says, evaluate it beside the baselines, and report",
                "examples:\n  karma-fast train shop.yaml\n  karma-fast train shop.yaml --learning_rate 1e-4 "
                f"--model.positions last\n  karma-fast train shop.yaml --resume\n\n{settings_help()}", True)
    train.add_argument("config", metavar="CONFIG.yaml", help="sections data:, model: and training:, and maybe recipe:")
    again = train.add_mutually_exclusive_group()
    again.add_argument("--overwrite", action="store_true", help="replace an earlier run in the same folder")
    for group in (demo, again):
        group.add_argument("--resume", action="store_true", help="go on from the last complete checkpoint")

    evaluate = add("evaluate", "evaluate", "rank the held-out items of a data set against its whole catalogue",
                   "examples:\n  karma-fast evaluate runs/demo\n  karma-fast evaluate runs/demo --split valid --json")
    evaluate.add_argument("model", metavar="MODEL", help="a run's folder or a saved model's")
    evaluate.add_argument("--split", choices=("test", "valid"), default="test", help="which targets (default: test)")
    evaluate.add_argument("--baselines", action="store_true", help="rows of popularity, item-kNN and title "
                          "TF-IDF too, and of query TF-IDF and query kNN where requests have queries")

    diagnose = add("diagnose", "diagnose", "measure collapse: attention, embeddings, perplexity, probes",
                   "examples:\n  karma-fast diagnose runs/demo --untuned\n  karma-fast diagnose runs/shop shop.yaml "
                   "--requests 256 --output shop.json\n  karma-fast diagnose my-finetuned-llm shop.yaml --base "
                   "Qwen/Qwen2.5-0.5B\n\nA run's folder gets diagnostics.json and a section in its report.")
    diagnose.add_argument("model", metavar="MODEL", help="folder of a run, of a saved model, or of a plain language "
                          "model of transformers or peft")
    diagnose.add_argument("config", metavar="CONFIG.yaml", nargs="?", help="its data section is used (default: the "
                          "run's)")
    diagnose.add_argument("--requests", type=whole, default=1024, metavar="N", help="held-out requests to look at, "
                          "drawn by the seed (default: 1024)")
    diagnose.add_argument("--split", choices=("test", "valid"), default="test", help="which targets (default: test)")
    diagnose.add_argument("--untuned", action="store_true", help="measure the language model before tuning too, "
                          "around the same projections")
    diagnose.add_argument("--decoder-steps", type=int, default=60, metavar="N", help="training steps of the fresh "
                          "decoders; 0 leaves them out (default: 60)")
    diagnose.add_argument("--base", metavar="M", help="of a plain language model: hub id or folder of what it was "
                          "before tuning")
    diagnose.add_argument("--max-history", type=whole, default=20, metavar="N", help="of a plain language model: "
                          "items that a prompt lists (default: 20)")
    diagnose.add_argument("--seed", type=int, default=0, help="of the requests drawn and of the probes (default: 0)")
    diagnose.add_argument("--output", metavar="FILE.json", help="write there, and nothing into the run's folder")

    recommend = add("recommend", "recommend", "list the next items for a user or a typed history",
                    'examples:\n  karma-fast recommend runs/demo --history "Toy Story, Aladdin" --explain\n'
                    "  karma-fast recommend runs/demo --user 196 --k 20\n  karma-fast recommend runs/shop --history "
                    '"B07X,B08Y" --query "running shoes" --json')
    recommend.add_argument("model", metavar="MODEL", help="a run's folder or a saved model's")
    who = recommend.add_mutually_exclusive_group(required=True)
    who.add_argument("--user", metavar="ID", help="a user of the data the model was trained on, or of --data")
    who.add_argument("--history", metavar='"ITEM, ITEM"', help="ids or titles, oldest first; part of a title will do "
                     "where only one item has it")
    recommend.add_argument("--query", default="", help="what the user searches for")
    recommend.add_argument("--k", type=whole, default=10, help="how many items (default: 10)")
    recommend.add_argument("--explain", action="store_true", help="also decode the interest embedding into text")

    embed = add("embed", "embed", "write the embeddings of items and users to files",
                "examples:\n  karma-fast embed runs/demo --items items.parquet --users users.parquet\n"
                "  karma-fast embed runs/demo --items items.npy\n\n.parquet has the columns id and embedding "
                "(list of float32);\nNAME.npy is (rows, width) float32 and goes with NAME.ids.txt, one id a line.\n"
                "A user's embedding is of their last model.max_history events, held-out ones included, and of no "
                "query.\nScores are inner products.")
    embed.add_argument("model", metavar="MODEL", help="a run's folder or a saved model's")
    embed.add_argument("--items", metavar="FILE", help=".parquet or .npy for the item embeddings")
    embed.add_argument("--users", metavar="FILE", help=".parquet or .npy for the user embeddings")
    for command in (evaluate, recommend, embed):
        command.add_argument("--data", metavar="CONFIG.yaml", help="data section to use (default: that of the run)")

    check = add("check-data", "check_data", "read the data, count it, and list what is wrong with it",
                "examples:\n  karma-fast check-data shop.yaml\n  karma-fast check-data --interactions clicks.csv "
                f"--items items.csv --time_column ts\n\n{section_help(DataConfig)}", True)
    check.add_argument("config", metavar="CONFIG.yaml", nargs="?", help="its data section is read, and what its model "
                       "makes of queries")
    baselines = add("baselines", "baselines", "rank the held-out items with training-free scorers, a mix and SASRec",
                    "examples:\n  karma-fast baselines shop.yaml\n  karma-fast baselines shop.yaml --unmasked --seeds "
                    "0,1,2 --output baselines.json\n  karma-fast baselines --name ml-100k --no-sasrec\n  karma-fast "
                    "baselines shop.yaml --sasrec.dim 128 --folder runs/sasrec\n\nAll that is fitted comes from the "
                    "training part of the events; the mix's weights and SASRec's epoch are\nchosen on the validation "
                    "requests. Where requests have queries, four more rows read them: query TF-IDF and query\nkNN "
                    f"alone, and added to the mix.\n\n{section_help(DataConfig)}", True)
    baselines.add_argument("config", metavar="CONFIG.yaml", nargs="?", help="its data section is read")
    for command in (evaluate, baselines, recommend):
        counted = "" if command is recommend else "; such a target is missed"
        masked = command.add_mutually_exclusive_group()
        masked.add_argument("--masked", dest="masked", action="store_true", default=True,
                            help=f"leave out what the user chose before{counted} (default)")
        masked.add_argument("--unmasked", dest="masked", action="store_false", help="rank all items")
    for command in (demo, train, evaluate, baselines):
        command.add_argument("--test-users", type=partial(whole, least=0), metavar="N",
                             help="rank N requests, in every command the same; 0: all (default: all, but at most "
                             f"{MOST_REQUESTS:,})")
    baselines.add_argument("--no-sasrec", action="store_true", help="only what needs no training")
    baselines.add_argument("--seed", type=int, default=0, help="of search and SASRec (default: 0)")
    baselines.add_argument("--seeds", metavar="0,1,2", help="train SASRec with each; its row is their mean")
    baselines.add_argument("--folder", metavar="FOLDER", help="keep SASRec and its checkpoints there; the same "
                           "command goes on from them")
    baselines.add_argument("--output", metavar="FILE.json", help="write table, weights and protocol there")
    plan = add("plan", "plan", "predict the GPU memory of a training run, and find settings that fit",
               "examples:\n  karma-fast plan shop.yaml --gpu-memory 12GB\n  karma-fast plan --model qwen2.5-1.5b "
               "--gpu-memory 8GB --batch-size 4096\n  karma-fast plan --model qwen2.5-7b --batch-size 4096 "
               "--chunk-size 8 --json\n\nNeither weights nor a GPU are needed: only config.json is read, and for "
               "smollm2-135m-instruct and\nqwen2.5-0.5b, -1.5b, -3b and -7b not even that. Exit code 1 says that "
               f"nothing fits.\n\n{settings_help()}", True)
    plan.add_argument("config", metavar="CONFIG.yaml", nargs="?", help="settings and data; without it, stated "
                      "assumptions are made about the data")
    plan.add_argument("--model", metavar="M", help="model.backbone: a local folder, a hub id, or a short name "
                      "such as qwen2.5-1.5b (for plan alone; training takes the hub id, such as Qwen/Qwen2.5-1.5B)")
    plan.add_argument("--gpu-memory", metavar="12GB", help="memory of a GPU, taken to have bfloat16; GB are 10^9 "
                      "bytes, GiB 2^30 (default: the first GPU here, with its own compute capability)")
    plan.add_argument("--batch-size", type=whole_or_word, metavar="PAIRS",
                      help="query-target pairs that compete in a step on one GPU (training.batch_size)")
    plan.add_argument("--chunk-size", type=whole_or_word, metavar="WINDOWS",
                      help="read at once (training.chunk_size); default, as auto: the largest that fits")
    select = add("select", "select", "choose training requests evenly over kinds of users and items, as RA-Rec does",
                 "examples:\n  karma-fast select shop.yaml --share 0.06 --overlap --output chosen.csv\n\nTraining "
                 "does the same with recipe: ra_rec and model.select_share, model.select_overlap.\n\n"
                 f"{section_help(DataConfig)}", True)
    select.add_argument("config", metavar="CONFIG.yaml", nargs="?", help="its data section is read")
    select.add_argument("--share", type=float, default=1.0, help="of all requests that are to be kept (default: 1)")
    select.add_argument("--overlap", action="store_true", help="only requests whose target's title shares a word with "
                        "the history's")
    select.add_argument("--draw-seed", type=int, default=0, help="of the draw (default: 0)")
    select.add_argument("--output", metavar="FILE.csv", help="user, item and event number of each")
    doctor = add("doctor", "doctor", "show versions, hardware, caches, and how to install what is missing",
                 "example:\n  karma-fast doctor --json")
    for command in (evaluate, diagnose, recommend, check, plan, doctor):
        command.add_argument("--json", action="store_true", help="machine-readable output")
    return parser, made


def whole(text: str, least: int = 1) -> int:
    if not text.isdigit() or int(text) < least:
        raise argparse.ArgumentTypeError(f"got {text!r}; a whole number of {least} or more is needed")
    return int(text)


def whole_or_word(text: str) -> int | str:
    """Like `whole`; ``auto`` and ``none`` are for the setting of that name to take or to refuse."""
    return text if text in ("auto", "none") else whole(text)


def section_help(section: type) -> str:
    """The settings of a section with their defaults, in lines of at most 100 characters.

    >>> print(section_help(DataConfig).splitlines()[0])
    data settings (defaults):
    """
    lines, line = [f"{section.section} settings (defaults):"], " "
    for field in dataclasses.fields(section):
        word = f" {field.name}={'' if field.default is None else field.default}"
        if len(line) + len(word) > 100:
            lines, line = [*lines, line], " "
        line += word
    return "\n".join([*lines, line])


def settings_help() -> str:
    from .recipes.ra_rec import Config as RaRecConfig

    others = section_help(RaRecConfig).replace("model settings", "model settings with recipe: ra_rec")
    return (f"{section_help(DataConfig)}\n\n{section_help(KarmaConfig)}\n\n{others}\n\n"
            "training settings: batch_size chunk_size learning_rate projection_learning_rate num_train_epochs\n"
            "  max_steps warmup_steps save_steps logging_steps eval_strategy eval_steps eval_users share_steps seed\n"
            "  output_dir, per_device_train_batch_size where batch_size is not set, and other fields of\n"
            "  transformers' TrainingArguments. Those that a step could not follow are refused with what to do.\n"
            "Write a setting as --name value or --section.name value. --seed alone is training.seed.")


if __name__ == "__main__":
    sys.exit(main())
