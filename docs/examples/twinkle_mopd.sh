# Twinkle's proposed distillation from two teachers with tokenizers of their own, on-policy.
export STUDENT_MODEL_ID=Qwen/Qwen3-1.7B
export TEACHER_MODEL_IDS=meta-llama/Llama-3.2-3B-Instruct,Qwen/Qwen3-4B
export TEACHER_WEIGHTS=0.2,0.8
export DATASET_ID=data/tasks.jsonl
export LOSS_TYPE=pkl TEMPERATURE=1.2 MAX_LENGTH=4 BETA=0.95 GAMMA=0.1 VOCAB_TOPK=512
export REVERSE_KL=false KL_LOSS_WEIGHT=0.5 CE_LOSS_WEIGHT=0.1
export BATCH_SIZE=8 GRADIENT_ACCUMULATION_STEPS=4 MAX_STEPS=300 LR=2e-5 MAX_NEW_TOKENS=1024
python cross_token_trainer_on_policy_two_teacher.py
