"""Calling users' reward functions, checking them before training, and a few well-known rewards."""

from shoal.rewards.caller import GroupScore, OnError, RewardCaller
from shoal.rewards.failures import FailureLog
from shoal.rewards.functions import RewardFunction, normalise_reward_funcs
from shoal.rewards.known import accuracy_reward, get_soft_overlong_punishment, think_format_reward
from shoal.rewards.preflight import check_rewards

__all__ = [
    "FailureLog",
    "GroupScore",
    "OnError",
    "RewardCaller",
    "RewardFunction",
    "accuracy_reward",
    "check_rewards",
    "get_soft_overlong_punishment",
    "normalise_reward_funcs",
    "think_format_reward",
]
