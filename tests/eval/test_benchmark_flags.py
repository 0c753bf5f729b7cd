"""Every scorer and converter takes the published flags, with the published defaults."""

import importlib

import pytest

PROGRAMS = {
    "eval.py (GQA)": "llava/eval/eval_gqa.py",
    "eval_tool/calculation.py (MME)": "llava/eval/eval_mme.py",
    "convert_answer_to_mme.py": "scripts/convert_answer_to_mme.py",
}
TYPES = {"str": (None, str), "int": (int,), "list": (list,), None: (None, str)}


@pytest.fixture
def parser_of(script, monkeypatch):
    """`parser_of("llava/eval/eval_pope.py")` is the parser its `main` builds."""

    def load(path):
        name = path.removesuffix(".py").replace("/", ".")
        main = script(name.split(".")[-1]) if path.startswith("scripts/") else importlib.import_module(name).main
        caught = []
        monkeypatch.setitem(main.__globals__, "run", lambda parser, *_: caught.append(parser))
        main([])
        return caught[0]

    return load


def test_flags_and_defaults(golden, parser_of):
    programs = golden("entry_points")
    assert len(programs) == 13
    for program, flags in programs.items():
        known = parser_of(PROGRAMS.get(program, program))._option_string_actions
        changed = {flag["flag"]: flag for flag in flags.get("apet_added_or_changed", [])}
        for flag in flags["upstream"]:
            names = flag["flag"] if isinstance(flag["flag"], list) else [flag["flag"]]
            flag = changed.get(names[0], flag)
            for name in names:
                action = known[name]
                assert action.nargs == flag.get("nargs", 0 if flag.get("action") == "store_true" else None), name
                assert action.type in TYPES[flag.get("type")], name
                if not action.required:
                    assert action.default == flag.get("default", False if action.nargs == 0 else None), (program, name)
                if flag.get("required"):
                    assert action.required, name
