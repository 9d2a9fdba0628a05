"""Registers the marks of transformers' tests and prints a table of their outcomes."""

from collections import Counter

import pytest

from dfn_hf.benchmarks.harness.results import markdown_table

FAMILIES = {
    "TestDFN": "DFN",
    "TestDFNWithLargeWeights": "DFN, large weights",
    "TestAdaptiveDFN": "DFN, adaptive",
    "TestAdaptiveDFNWithLargeWeights": "DFN, adaptive, large weights",
    "TestFlowNetwork": "FlowNetwork",
    "TestFlowNetworkWithLargeWeights": "FlowNetwork, large weights",
    "TestLiquid": "Liquid",
    "TestLiquidWithLargeWeights": "Liquid, large weights",
    "TestLiquidEncoder": "Liquid's encoder",
    "TestLiquidEncoderWithLargeWeights": "Liquid's encoder, large weights",
}
MARKS = (
    "accelerate_tests",
    "flash_attn_test",
    "flash_attn_3_test",
    "flash_attn_4_test",
    "is_training_test",
    "torch_compile_test",
)
MACHINE_REASONS = ("test requires", "test is slow", "Not a prioritized model")


def pytest_configure(config: pytest.Config) -> None:
    for mark in MARKS:
        config.addinivalue_line("markers", f"{mark}: a mark of transformers' tests")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print a Markdown table of outcomes per class of `test_conformance.py`, and the tests skipped for a model."""
    counts: dict[str, Counter] = {}
    reasons: dict[str, set[str]] = {}
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.stats.get(outcome, ()):
            if type(report) is not pytest.TestReport or "test_conformance.py" not in report.nodeid:
                continue
            family = FAMILIES[report.nodeid.split("::")[1]]
            kind = outcome
            if outcome == "skipped":
                reason = report.longrepr[2].removeprefix("Skipped: ")
                kind = "machine" if reason.startswith(MACHINE_REASONS) else "model"
                if kind == "model":
                    reasons.setdefault(reason, set()).add(report.nodeid.split("::")[2])
            counts.setdefault(family, Counter())[kind] += 1
    if not counts:
        return
    header = ("family", "passed", "failed", "skipped for the machine", "skipped for the model")
    lines = [
        (
            name,
            *(str(n) for n in (found["passed"], found["failed"] + found["error"], found["machine"], found["model"])),
        )
        for name in FAMILIES.values()
        if (found := counts.get(name))
    ]
    terminalreporter.write_line("\n" + markdown_table(header, lines))
    terminalreporter.write_line("\nSkipped for the model:\n")
    for reason, tests in sorted(reasons.items()):
        terminalreporter.write_line(f"- {reason}: {', '.join(sorted(tests))}")
