"""Agents on a real server for long: is memory flat, do tables empty, do counters add up?"""
