"""Train a LoRA adapter that classifies user behaviour.

The steps are in llmrec_peft/recipes/train.py:

accelerate launch --config_file accelerate_configs/single_cpu.yaml recipes/lora.py \
    --config recipes/configs/movies/lora.yaml --data.path DIR --output_dir OUT
"""

from llmrec_peft.cli import launcher

main = launcher("lora")

if __name__ == "__main__":
    main()
