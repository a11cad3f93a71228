"""The user's own code that a run's settings name, imported and checked before anything else of the run begins.

Only what starts a training calls this. Reading a config, a run folder or a study imports nothing that they name.
"""

from configs.schema import RunConfig
from switti.import_path import is_import_path, load_factory, load_object


def check_extensions(config: RunConfig) -> None:
    """UserError if a logger is not installed, or an import path leads nowhere or to an object of another kind."""
    if further := [name for name in config.trainer.loggers if name not in ("tensorboard", "csv")]:
        # Not for the two others: it imports Lightning.
        from configs.loggers import check_loggers

        check_loggers(further)
    if config.callbacks.extra:
        from lightning.pytorch import Callback

        for path in config.callbacks.extra:
            load_factory("callbacks.extra", path, Callback)
    if config.metrics.extra:
        from switti.metrics.collection import extra_infos

        extra_infos(config.metrics)
    if config.task == "generator" and not config.text.is_built_in:
        load_object("text.encoder", config.text.encoder)
    if is_import_path(config.data.source):
        load_object("data.source", config.data.source)
