"""Records of training runs, and what can be believed about them: python -m records COMMAND.

a run writes     log.py: record.json, log.txt, source.txt, with environment, source, summary, signals, wandb_log, profile
                 settings.py: a dataclass as a command line
experiments      ab.py: arms.py (what to compare), schedule.py (order and ledger), runner.py, processes.py, worktrees.py,
                 live.py (the table while it goes), report.py
what they show   runs.py (reading), compare.py with alike.py and verdict.py, stats.py (tests), plan.py, plot.py, table.py
what holds       tracks.py (rules), verify.py on check.py, check_experiment.py, check_report.py, check_source.py,
                 checked_log.py, configuration.py and safe.py
in and out       submit.py with readme.py, replay.py, import_log.py
"""
