"""docs/faults.md says what happens on every fault and transport; here it happens."""

from pathlib import Path

import pytest

import fault_matrix

PAGE = Path(__file__).parents[1] / "docs" / "faults.md"


@pytest.fixture(scope="module")
def documented() -> dict[tuple[str, str], str]:
    return fault_matrix.read_table(PAGE.read_text(encoding="utf-8"))


@pytest.mark.parametrize("transport", fault_matrix.TRANSPORTS)
@pytest.mark.parametrize("fault", fault_matrix.FAULTS)
def test_what_happens_is_what_the_page_says(
    documented: dict[tuple[str, str], str], fault: str, transport: str, tmp_path: Path
) -> None:
    assert fault_matrix.observe(transport, fault, tmp_path) == documented[fault, transport]


def test_the_page_is_complete_and_loses_nothing_silently(
    documented: dict[tuple[str, str], str],
) -> None:
    expected = {(fault, name) for fault in fault_matrix.FAULTS for name in fault_matrix.TRANSPORTS}
    assert set(documented) == expected
    for name in fault_matrix.TRANSPORTS:
        assert (
            documented["none", name]
            == f"{fault_matrix.N_VOLUMES} of {fault_matrix.N_VOLUMES} results"
        )
        assert "1 missing" in documented["missing", name] or "AFNI" in name or "NIfTI" in name
