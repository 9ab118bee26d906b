"""MultiPL-E: HumanEval and MBPP, translated to other languages."""
