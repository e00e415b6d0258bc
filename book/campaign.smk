# The units of a plan that `python -m book.campaign results` has written, as Snakemake's rules.
# An edited plan runs nothing again: a unit's `.done` says from which code it was.
import json
import re
import sys

with open(config["plan"]) as file:
    JOBS = json.load(file)


rule all:
    input:
        [job["done"] for job in JOBS],


for place, job in enumerate(JOBS):

    rule:
        name:
            re.sub(r"\W+", "_", job["title"]) + f"_{place}"
        input:
            job["after"],
        output:
            job["done"],
        params:
            words=[sys.executable, *job["command"]],
        priority: len(JOBS) - place
        threads: int(config["threads"])
        resources:
            mem_mb=8000 * max(1, int(config.get("gpus", 0))),
            gpu=int(config.get("gpus", 0)),
        shell:
            "{params.words:q}"
