"""Records of training runs. `settings` turns a dataclass into a command line, `log` writes the folder a run leaves
behind (record.json, log.txt, source.txt) while it trains, `source` packs and unpacks the code of the run,
`environment` describes the machine without naming it, and `plot` draws the loss curve."""
