"""Training: a run described as data, and the trainer that carries it out."""

from vlcore.train.config import Part, Stage, TrainConfig
from vlcore.train.result import StageResult, TrainingInterrupted, TrainingStopped, TrainResult
from vlcore.train.run import run_file
from vlcore.train.schedule import learning_rate
from vlcore.train.stages import adaptor_warmup, joint_pretraining, supervised_finetuning, weighted
from vlcore.train.trainer import train

__all__ = [
    "Part",
    "Stage",
    "StageResult",
    "TrainConfig",
    "TrainResult",
    "TrainingInterrupted",
    "TrainingStopped",
    "adaptor_warmup",
    "joint_pretraining",
    "learning_rate",
    "run_file",
    "supervised_finetuning",
    "train",
    "weighted",
]
