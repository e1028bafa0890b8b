"""Which groups are made next: nothing is drawn twice, nothing is forgotten, in a resumed run neither."""

import json

from gft_megatron.data.order import PromptOrder
from gft_megatron.rollout.draws import DrawQueue


def told(draws):
    return [(draw.key.rollout_id, draw.key.group_id, draw.group_id, draw.row, draw.owner) for draw in draws]


def make():
    return DrawQueue(2), PromptOrder(100, seed=1, shuffle=False)


def resumed(queue, ahead=()):
    again = DrawQueue(2)
    again.load_state_dict(json.loads(json.dumps(queue.state_dict(ahead))))
    return again


def test_what_was_left_comes_first_under_its_own_name():
    queue, order = make()
    draws = queue.first(order, 0, 4)
    assert told(draws) == [(0, 0, 0, 0, 0), (0, 1, 1, 1, 1), (0, 2, 2, 2, 0), (0, 3, 3, 3, 1)]
    queue.leave([draws[3], draws[1]])
    assert told(resumed(queue).first(order, 1, 2)) == [(0, 1, 0, 1, 0), (0, 3, 1, 3, 1)], "nobody has a part of them"
    assert told(queue.first(order, 1, 3)) == [(0, 1, 0, 1, 1), (0, 3, 1, 3, 1), (1, 0, 2, 4, 0)]
    assert told(queue.more(order, 1, 2, first_id=3)) == [(1, 3, 3, 5, 0), (1, 4, 4, 6, 1)]


def test_rollouts_that_were_begun_are_the_same_in_a_resumed_run():
    queue, order = make()
    ahead = [(n, queue.first(order, n, 3)) for n in (5, 6)]
    again = resumed(queue, ahead)
    for n, draws in ahead:
        assert told(again.first(order, n, 3)) == told(draws)
    assert told(again.first(order, 7, 1)) == [(7, 0, 0, 6, 0)]


def test_rows_that_are_given_back_are_drawn_under_other_names():
    queue, order = make()
    draws = queue.first(order, 0, 4)
    queue.leave(draws[1:])
    assert queue.give_back() == draws[1:]
    queue = resumed(queue)
    assert told(queue.first(order, 1, 2)) == [(1, 0, 0, 1, 0), (1, 1, 1, 2, 1)]
    assert told(queue.first(order, 2, 2)) == [(2, 0, 0, 3, 0), (2, 1, 1, 4, 1)]
