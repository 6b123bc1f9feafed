"""Distill a trained teacher into a small student.

The steps are in llmrec_peft/recipes/distill.py:

accelerate launch --config_file accelerate_configs/single_cpu.yaml recipes/distill.py \
    --config recipes/configs/movies/distill.yaml --teacher OUT/bundle --data.path DIR --output_dir OUT
"""

from llmrec_peft.cli import launcher

main = launcher("distill")

if __name__ == "__main__":
    main()
