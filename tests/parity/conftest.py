"""Prints how far each recording was from its bound."""

from tests.parity.recordings import LARGEST


def pytest_terminal_summary(terminalreporter):
    for recording, (ratio, where) in sorted(LARGEST.items()):
        terminalreporter.write_line(
            f"parity with {recording}: largest difference is {ratio:.3f} of its bound ({where})"
        )
