"""`retentive completion SHELL`: a script that completes commands and options.

The options are those of each verb's help when the script is printed; files complete as everywhere.
"""

import importlib
import io
import re
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from retentive.bench import BENCHES
from retentive.cli import VERBS
from retentive.cli.parsing import parse

BASH = """\
_retentive() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} verb=${{COMP_WORDS[1]}} options=
    if [ "$COMP_CWORD" = 1 ]; then
        COMPREPLY=($(compgen -W "{verbs}" -- "$word"))
        return
    fi
    case "$verb" in
{cases}
    esac
    COMPREPLY=()
    case "$word" in
        -*) COMPREPLY=($(compgen -W "$options" -- "$word")) ;;
    esac
}}
complete -o default -F _retentive retentive
"""
ZSH = "autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit\n" + BASH
"""zsh runs bash's script."""


@dataclass(frozen=True)
class CompletionCommand:
    """Print a script that completes commands and options: add `eval "$(retentive completion bash)"` to ~/.bashrc (zsh:
    ~/.zshrc), or write fish's to ~/.config/fish/completions/retentive.fish."""

    shell: Annotated[tyro.conf.Positional[Literal["bash", "zsh", "fish"]], tyro.conf.arg(metavar="SHELL")]
    """bash, zsh or fish."""


def main(argv: list[str]) -> None:
    print(script(parse(CompletionCommand, "retentive completion", argv).shell), end="")


def script(shell: str) -> str:
    """Return the script for a shell."""
    found = {verb: options(verb) for verb in VERBS}
    if shell == "fish":
        lines = ["complete -c retentive -n __fish_use_subcommand -f"]
        for verb, (_, text) in VERBS.items():
            quoted = text.replace("'", "\\'")
            lines.append(f"complete -c retentive -n __fish_use_subcommand -a {verb} -d '{quoted}'")
            lines += [
                f"complete -c retentive -n '__fish_seen_subcommand_from {verb}' -l {name.removeprefix('--')}"
                for name in found[verb]
            ]
        return "\n".join(lines) + "\n"
    cases = "\n".join(f'        {verb}) options="{" ".join(names)}" ;;' for verb, names in found.items())
    return (ZSH if shell == "zsh" else BASH).format(verbs=" ".join(VERBS), cases=cases)


def options(verb: str) -> list[str]:
    """Return the options in a verb's help, also in those of its own verbs."""
    if verb == "completion":
        return []
    main = importlib.import_module(VERBS[verb][0]).main
    within = {"memory": ("write", "ask", "merge", "show"), "bench": tuple(BENCHES)}.get(verb)
    helps = "".join(helped(main, [name, "--help"]) for name in within) if within else helped(main, ["--help"])
    return sorted(set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", helps)))


def helped(main: Callable[[list[str]], None], argv: list[str]) -> str:
    """Return the help that a verb prints."""
    with redirect_stdout(io.StringIO()) as printed, suppress(SystemExit):
        main(argv)
    return printed.getvalue()
