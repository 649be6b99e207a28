"""What a decode instance offers another one to keep: messages of the wire and of core."""

from baton.core.errors import HandoverError, show
from baton.core.handover import Offer, Open
from baton.proto import worker_pb2 as pb
from baton.proto.convert import offer_core, offer_proto, open_core, open_proto


def backup_proto(open_: Open, offer: Offer) -> pb.BackupRequest:
    """Put blocks that are offered, and whose they are, on the wire."""
    return pb.BackupRequest(open=open_proto(open_), offer=offer_proto(offer))


def backup_core(message: pb.BackupRequest) -> tuple[Open, Offer]:
    """Take them off the wire; HandoverError or InvalidRequest if malformed.

    The blocks are full, whole, and the last that the prompt has before its last token.
    """
    open_, offer = open_core(message.open), offer_core(message.offer)
    size, layers = open_.layout.model.block_size, open_.layout.model.all_layers
    full = (len(open_.request.prompt) - 1) // size
    offered = range(offer.first_block, offer.first_block + len(offer.blocks))
    if not offered or offered.stop != full or offer.layers != layers or offer.first is not None:
        raise HandoverError(
            f"malformed message: BackupRequest.offer: {show(offered)} in {offer.layers}; "
            f"allowed: blocks up to {full}, in {layers}"
        )
    return open_, offer
