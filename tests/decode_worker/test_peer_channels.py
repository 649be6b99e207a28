from contextlib import AsyncExitStack

from baton.core.ids import Incarnation, InstanceId
from baton.decode_worker.peer_channels import PeerChannels, PeerRef


def ref(incarnation: int, name: str = "prefill-0") -> PeerRef:
    return PeerRef(InstanceId(name), "127.0.0.1:1", Incarnation(incarnation))


async def test_only_an_idle_channel_of_another_incarnation_is_closed() -> None:
    channels = PeerChannels()
    async with channels.channel(ref(1)), channels.channel(ref(1, "prefill-1")):
        assert len(channels) == 2
    assert len(channels) == 2, "an idle channel stays for the next request"
    async with channels.channel(ref(2)):
        assert len(channels) == 2, "the old one was idle"
        async with channels.channel(ref(1)), channels.channel(ref(1)):
            assert len(channels) == 3, "the new one is in use"
    assert len(channels) == 2
    await channels.close()
    assert len(channels) == 0


async def test_a_channel_in_use_outlives_a_restart_until_its_last_user_has_left() -> None:
    channels = PeerChannels()
    async with AsyncExitStack() as second:
        async with channels.channel(ref(1)):
            await second.enter_async_context(channels.channel(ref(1)))
            async with channels.channel(ref(2)):
                pass
            assert len(channels) == 2
        assert len(channels) == 2
    assert len(channels) == 1, "the old one went with its last user"
    await channels.close()


async def test_who_leaves_after_the_end_finds_nothing_to_close() -> None:
    channels = PeerChannels()
    async with channels.channel(ref(1)), channels.channel(ref(2)):
        await channels.close()
    assert len(channels) == 0
