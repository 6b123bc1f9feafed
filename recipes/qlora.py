"""Train a LoRA adapter on a 4-bit base.

The steps are in llmrec_peft/recipes/train.py:

accelerate launch --config_file accelerate_configs/single_cpu.yaml recipes/qlora.py \
    --config recipes/configs/movies/qlora.yaml --data.path DIR --output_dir OUT
"""

from llmrec_peft.cli import launcher

main = launcher("qlora")

if __name__ == "__main__":
    main()
