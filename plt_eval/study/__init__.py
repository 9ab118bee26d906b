"""Studies: one recipe trained at several loop counts, each model evaluated, gain and cost in one table.

from plt_eval.study.plan import StudyPlan
from plt_eval.study.run import run_study
study = run_study(StudyPlan(recipe="quick", loops=(1, 2), out=Path("results/studies/quick")), console)
study.summary[0].heldout["python"].bits_per_byte.value
"""
