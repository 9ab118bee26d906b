"""Text on this machine or the hub, made into token data to train on: `plt-eval data build`.

from plt_eval.corpus import build, build_recipe_data, parse_source
"""

from plt_eval.corpus.builder import BuildInterrupted, build, build_recipe_data
from plt_eval.corpus.sources import Source, parse_source, parse_source_option

__all__ = ["BuildInterrupted", "Source", "build", "build_recipe_data", "parse_source", "parse_source_option"]
