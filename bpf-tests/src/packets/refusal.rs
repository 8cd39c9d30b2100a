//! What refuses a packet: a new one, back to its sender.

use super::isolation::Reason;
use super::oracle::{Judgement, Seen, Sent, To};
use super::wire::{ACK, Body, ETHERNET, FIN, RST, SYN, Segment};

/// RST (RFC 9293 section 3.10.7.1) or port unreachable (RFC 792, RFC 4443); a reset is not answered (rule 14).
pub(super) fn refused(sent: &Sent, seen: &Seen) -> Result<(), Judgement> {
    let Sent { packet, fragments, .. } = sent;
    let wrong = |what: &str| Err(Judgement::Wrong(what.to_owned()));
    if let Body::Tcp(Segment { flags, .. }) = packet.body
        && flags & RST != 0
    {
        return dropped(seen, &["no-endpoint"]);
    }
    let Seen::Went(To::Sender, answer) = seen else { return wrong("refused") };
    if (answer.src, answer.dst) != (packet.dst, packet.src) || answer.hops == 0 {
        return wrong("a refusal from who was asked to who asked");
    }
    match (&packet.body, &answer.body) {
        (Body::Tcp(asked), Body::Tcp(answer)) if resets(asked, *fragments, answer) => Ok(()),
        (Body::Tcp(_), Body::Tcp(_)) => wrong("a reset that the connection takes"),
        (Body::Tcp(_), _) => wrong("a reset"),
        (_, Body::Icmp { kind, code, payload, .. }) => {
            let port_unreachable = if packet.src.is_ipv4() { (3, 3) } else { (1, 4) };
            // Of fragments it is the first one that is refused.
            let parts = fragments.map(|size| packet.fragments(size));
            let sent = parts.map_or_else(|| packet.build(), |mut parts| parts.swap_remove(0));
            let transport =
                fragments.map_or(packet.transport_length(), |size| packet.transport_length().min(size));
            let (sent, head) = (&sent[ETHERNET..], sent.len() - ETHERNET - transport);
            if (*kind, *code) == port_unreachable && sent.starts_with(payload) && payload.len() >= head + 8 {
                Ok(())
            } else {
                wrong("port unreachable, with what it is about")
            }
        }
        _ => wrong("port unreachable"),
    }
}

/// Whether a connection that sent `asked` takes `answer` for its end. Of a segment in fragments the first one is answered,
/// which acknowledges what is in it.
fn resets(asked: &Segment, fragments: Option<usize>, answer: &Segment) -> bool {
    let header = 20 + asked.options.len();
    let payload =
        fragments.map_or(asked.payload.len(), |size| asked.payload.len().min(size.saturating_sub(header)));
    let controls = u32::from(asked.flags & SYN != 0) + u32::from(asked.flags & FIN != 0);
    let expected = if asked.flags & ACK != 0 {
        (asked.ack, 0, RST)
    } else {
        (0, asked.seq.wrapping_add(payload as u32 + controls), RST | ACK)
    };
    (answer.seq, answer.ack, answer.flags) == expected
        && (answer.ports.src, answer.ports.dst) == (asked.ports.dst, asked.ports.src)
        && answer.payload.is_empty()
}

/// Whether a packet was dropped, and counted under one of these reasons.
pub(super) fn dropped(seen: &Seen, reasons: &[Reason]) -> Result<(), Judgement> {
    match seen {
        Seen::Dropped(Some(reason)) if reasons.contains(reason) => Ok(()),
        Seen::Dropped(_) | Seen::Went(..) => {
            Err(Judgement::Wrong(format!("dropped {}", reasons.join(" or "))))
        }
    }
}
