"""Numbers that no picture can be drawn with are refused before anything is loaded or drawn."""

from __future__ import annotations

import math

import pytest

import diffpeft
from diffpeft.pipeline.open import open_pipeline


@pytest.mark.slow
@pytest.mark.parametrize("guidance", [math.nan, math.inf])
def test_a_guidance_is_finite(guidance):
    with pytest.raises(diffpeft.ConfigError, match="finite"):
        diffpeft.generate(open_pipeline(), ["an emoji of lemon"], seeds=[0], steps=1, guidance=guidance)
