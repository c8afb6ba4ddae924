"""`fastft check-dataset`: whether a data set is fit to be learned from."""

from fastft import console
from fastft.cli.job import Job


def check_dataset(config: str, *overrides: str) -> Job:
    """Read the whole data set and say what is wrong with it.

    It is read as the training would read it, on the CPU. Counts rows, formats, lengths, samples that are cut off, empty, repeated, masked as a whole or without an answer, and
    the tokens of an epoch. Exit code 1 if rows cannot be read, or a limit in `data.check` is not kept.

    Args:
        config: recipe name or config file
        overrides: values to change, e.g. data.check.max_truncated=0.05
    """

    def run() -> int:
        from fastft.cli.log_dataset import read
        from fastft.data import check

        settings, _, prepared = read(config, overrides, keep_going=True)
        report = prepared.report
        for line in check.lines(report, settings.data, settings.train.batch_size):
            console.result(console.printable(line))
        found = check.problems(report, settings.data)
        bad_rows = sum(part.skipped for part in (report.train, report.eval) if part is not None)
        if bad_rows and settings.data.on_bad_row == "error":
            found.insert(0, f"{bad_rows:,} rows cannot be read (on_bad_row: error)")
        if not report.train.samples:
            found.append("nothing is left to learn from")
        for phrase in found:
            console.error(phrase)
        if not found:
            console.result("fit to be learned from")
        return 1 if found else 0

    return Job(run)
