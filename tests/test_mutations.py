"""The mutations of tests/mutations.py still fit the code, and every one is noticed by some law."""

import pytest
from mutations import MUTATIONS, ROOT, Mutation, main


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_mutation_fits_the_code_in_exactly_one_place(mutation: Mutation) -> None:
    assert mutation.fits(ROOT / "relora_opt"), (
        f"update the mutation: {mutation.file} no longer holds {mutation.old!r} once"
    )


def test_mutations_have_names_and_tests_of_their_own() -> None:
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS) >= 14
    for mutation in MUTATIONS:
        assert mutation.tests[1].split()[0] in (ROOT / "tests" / mutation.tests[0]).read_text()


@pytest.mark.slow
def test_every_mutant_is_killed() -> None:
    assert main() == 0
