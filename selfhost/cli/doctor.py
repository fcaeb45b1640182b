"""`selfhost doctor`: why a frontend on this host has, or has not, the files of a card."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from .cards import add_card, add_file_roots, is_card_url, read_text, transport_options
from .support import add_command, printable

if TYPE_CHECKING:
    from ..frontend.diagnosis import Diagnosis, Step
    from .support import Commands

DOCTOR_EXAMPLES = """\
examples:
  selfhost doctor http://127.0.0.1:9090/v1/metadata/my_model/_base
  selfhost doctor card.json                 a card, or a record of a discovery, in a file
  selfhost doctor card.json --json | python3 -m json.tool

It asks as a frontend on this host would, by the same rules and limits, but uses no cache and leaves nothing
behind. CARD may also be the URL of one file, with its ?blake3=... . It prints a line for each step and, below
one that failed, what can be done. Exit code 0 if every file is what the card says, else 1.
"""


def add_doctor(commands: Commands) -> None:
    """Add `selfhost doctor`."""
    does = "fetch and verify as a frontend would, and say what is the matter"
    parser = add_command(commands, "doctor", doctor, does, DOCTOR_EXAMPLES)
    add_card(parser)
    add_file_roots(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object, for machines")


def doctor(arguments: argparse.Namespace) -> int:
    """Examine the card and print what was found; return the exit code."""
    from ..frontend.diagnosis import diagnose

    source = arguments.card if is_card_url(arguments.card) else read_text(arguments.card)
    options = transport_options(arguments)
    if arguments.json:
        diagnosis = diagnose(source, **options)
        _print_json(diagnosis)
    else:
        diagnosis = diagnose(source, tell=_print_step, **options)
        for notice in diagnosis.notices:
            print(f"notice  {printable(notice)}")
        print(f"{_verdict(diagnosis.is_ok)}{printable(diagnosis.summary)}")
    return 0 if diagnosis.is_ok else 1


def _print_step(step: Step) -> None:
    what = f"{step.subject}: {step.name}"
    line = f"{what:<32}{1000 * step.seconds:8.1f} ms  {step.detail}"
    print(f"{_verdict(not step.problem)}{printable(line)}", flush=True)
    if step.problem:
        print(f"        {printable(step.problem)}: {printable(step.remedy)}", flush=True)


def _verdict(is_ok: bool) -> str:
    return "ok      " if is_ok else "FAILED  "


def _print_json(diagnosis: Diagnosis) -> None:
    import dataclasses
    import json

    told = {"ok": diagnosis.is_ok, "summary": diagnosis.summary, **dataclasses.asdict(diagnosis)}
    print(json.dumps(told))
