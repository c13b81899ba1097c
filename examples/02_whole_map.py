"""The main job: map a behaviour, and keep the run with its report."""

# long: learns gates and judges them; about a minute

import patchclamp as pc
from patchclamp.report import write_report
from patchclamp.study import open_run

model, task, plan = pc.Model.load("zoo/small"), pc.load_task("ioi"), pc.Plan(n=128)
with open_run(None, model, task, plan) as run:
    study = pc.map(model, task, plan, run)

print(study)  # one sentence
for claim in study.claims:
    print(claim.verdict, "|", claim.statement, "|", claim.evidence)
print(study.scores.select("site", "role", "exact", "exact_low", "exact_high"))
assert study.folder is not None
print(write_report(study.folder))
