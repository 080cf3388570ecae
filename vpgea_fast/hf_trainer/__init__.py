"""VPG-EA in Hugging Face's Trainer, by TRL's conventions: `VPGEATrainer` and its `VPGEAConfig`.

    trainer = VPGEATrainer(model=model, args=VPGEAConfig("out"), train_dataset=rows,
                           processing_class=tokenizer)
    trainer.train()

TRL itself is not needed. Its Trainer wants accelerate, which this package leaves to its user.
"""

from vpgea_fast.hf_trainer.config import VPGEAConfig
from vpgea_fast.hf_trainer.trainer import RewardFunc, VPGEATrainer

__all__ = ["RewardFunc", "VPGEAConfig", "VPGEATrainer"]
