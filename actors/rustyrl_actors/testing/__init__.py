"""The conformance kit: what any world is held to, for ``rustyrl check`` and for your own test suite.

from rustyrl_actors.testing import assert_conforms

def test_my_world_conforms():
    assert_conforms("my_game.py:Arena", slots=2)
"""

from rustyrl_actors.testing.conformance import CHECKS, Finding, assert_conforms, check_environment

__all__ = ["CHECKS", "Finding", "assert_conforms", "check_environment"]
