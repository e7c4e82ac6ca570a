"""The summary at the end of a run: what was measured, a fact a line."""


RULE = "-" * 80


def summary(content, place):
    """content: a record (dict).  place: where it lies (str).  Returns the text, without a newline at its end."""
    metric = "accuracy" if "accuracy" in content else "val_loss"
    seconds, steps, points = content["train_time_s"], content["steps"], content["validation"]
    value = "none measured" if not points else "not finite" if content[metric] is None else f"{content[metric]:.5f}"
    rows = {"run": f"{content['track']} {content['name']}",
            "accuracy" if metric == "accuracy" else "validation loss": value}
    if content["target"] is not None:
        rows["target"] = f"{content['target']:g}, " + (
            f"reached after {content['time_to_target_s']:.3f} s" if content["reached"] else "not reached")
    rows["train time"] = f"{seconds:.3f} s"
    rows["steps"] = f"{steps} of {content['steps_planned']}, {1000 * seconds / max(steps, 1):.2f} ms each"
    if points and points[-1]["train_time_s"] > 0:
        rows["tokens"] = f"{content['tokens']:,}, {content['tokens'] / points[-1]['train_time_s']:,.0f} per second"
    if content["peak_memory_bytes"] is not None:
        rows["peak memory"] = f"{content['peak_memory_bytes'] / 2**30:.2f} GiB"
    rows |= {key: f"{value:.5f}" if isinstance(value, float) else str(value)
             for key, value in content["extra"].items() if not isinstance(value, dict)}     # those are tables
    if content["status"] != "complete":
        rows["status"] = f"{content['status']}: {content['message']}"
    rows["record"] = place
    width = max(map(len, rows))
    return "\n".join([RULE, *(f"{key:{width}}  {value}" for key, value in rows.items()), RULE])
