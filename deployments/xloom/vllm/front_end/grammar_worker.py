"""Compiles grammars in a process that may be killed.

`python -m xloom.vllm.front_end.grammar_worker LIBRARY WHITESPACE SECONDS BYTES`: xgrammar or guidance, `compact` or
`loose`, and the limits of one grammar. The first line on stdin is the tokeniser, as
`xgrammar.TokenizerInfo.serialize_json` writes it, and empty for guidance; each line after it a JSON object with `kind`
and `spec`. Each is answered by a line on stdout: `{"error": null}`, or what the library said. As
`vllm.v1.structured_output.{backend_xgrammar.XgrammarBackend.compile_grammar, backend_guidance.
serialize_guidance_grammar}`, 0.32, do in the engine.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Compile = Callable[[str, str], None]  # kind, spec


def main(library: str, compact: bool, seconds: float, memory: int) -> None:
    """Serve stdin until it ends. A grammar that takes over `seconds` of processor time or `memory` ends the process.

    vLLM's engines give a regular expression 5 s (`vllm.v1.structured_output.utils.compile_regex_with_timeout`, 0.32),
    by the clock and with their model beside it: what is let through must be well within that.
    """
    os.nice(10)  # the router and engines of this machine come first
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    tokenizer = sys.stdin.buffer.readline().decode()
    compile_grammar = _xgrammar(tokenizer, compact) if library == "xgrammar" else _guidance(compact)
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else 0
    most = pages * resource.getpagesize() + memory
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, seconds)
        signal.setitimer(signal.ITIMER_REAL, 20 * seconds)  # should nobody be left to end this process
        try:
            asked = json.loads(line)
            compile_grammar(asked["kind"], asked["spec"])
            error = None
        except MemoryError:
            os._exit(1)
        except Exception as raised:  # the libraries' errors have no common type
            error = str(raised)[:1000]
        for timer in (signal.ITIMER_PROF, signal.ITIMER_REAL):
            signal.setitimer(timer, 0)
        print(json.dumps({"error": error}), file=answers, flush=True)


def _xgrammar(tokenizer: str, compact: bool) -> Compile:
    import xgrammar

    info = xgrammar.TokenizerInfo.deserialize_json(tokenizer)
    compiler: Any = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)

    def compile_grammar(kind: str, spec: str) -> None:
        if kind == "json":
            separators = (",", ":") if compact else None
            compiler.compile_json_schema(spec, any_whitespace=not compact, separators=separators)
        elif kind == "structural_tag":
            tag = json.loads(spec)
            if "structures" not in tag:
                compiler.compile_structural_tag(spec)
                return
            items = [
                xgrammar.StructuralTagItem(begin=each["begin"], schema=json.dumps(each["schema"]), end=each["end"])
                for each in tag["structures"]
            ]
            compiler.compile_structural_tag(items, tag["triggers"])
        else:
            named = {
                "regex": compiler.compile_regex,
                "lark": compiler.compile_lark,
                "grammar": compiler.compile_grammar,
            }
            named[kind](spec)

    return compile_grammar


def _guidance(compact: bool) -> Compile:
    import llguidance

    matcher: Any = llguidance.LLMatcher

    def compile_grammar(kind: str, spec: str) -> None:
        schemas = {"json": [spec]}.get(kind, [])
        if kind == "structural_tag":  # guidance knows the older form alone
            schemas = [json.dumps(each["schema"]) for each in json.loads(spec)["structures"]]
        if kind in ("json", "structural_tag"):
            defaults = {"whitespace_flexible": not compact}
            grammars = [matcher.grammar_from_json_schema(each, defaults=defaults) for each in schemas]
        else:
            grammars = [llguidance.grammar_from("regex" if kind == "regex" else "grammar", spec)]
        for grammar in grammars:
            matcher.validate_grammar(grammar, None)

    return compile_grammar


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] == "compact", float(sys.argv[3]), int(sys.argv[4]))
