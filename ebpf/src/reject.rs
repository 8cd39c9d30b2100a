//! Refusing a packet: it is turned into its own answer, TCP RST or ICMP port unreachable (rule 14).

use core::mem::offset_of;

use ferroflow_common::addr::Proto;
use ferroflow_common::csum::Sum;
use ferroflow_common::family::{Family, V4, V6};
use ferroflow_common::tcp::Flags;
use ferroflow_common::verdict::{DropReason, Verdict};
use network_types::eth::EthHdr;
use network_types::icmp::Icmpv4Hdr;
use network_types::tcp::TcpHdr;
use network_types::udp::UdpHdr;

use crate::conntrack;
use crate::packet::{L3, Reshape, SUM_MAX};
use crate::parse::{Headers, Parse};

const TCP_LEN: u32 = TcpHdr::LEN as u32;
const ICMP_LEN: u32 = Icmpv4Hdr::LEN as u32;

/// What the answer of each family looks like.
pub trait Answer: Parse {
    /// Type and code of "port unreachable" (RFC 792, RFC 4443 section 3.1).
    const PORT_UNREACHABLE: [u8; 2];
    /// Type and code of "fragmentation needed" (RFC 1191), "packet too big" (RFC 4443 section 3.2).
    const TOO_BIG: [u8; 2];
    /// What every link carries, in bytes (RFC 791 says it of receivers, RFC 8200 section 5).
    const LEAST_MTU: u32;

    /// Writes a fresh IP header from the packet's destination back to its source.
    ///
    /// # Errors
    /// [`DropReason::Rewrite`].
    fn write_header<P: Reshape>(
        packet: &mut P,
        headers: &Headers<Self>,
        proto: Proto,
        payload: u32,
    ) -> Result<(), DropReason>;
}

const HOP_LIMIT: u8 = 64;

impl Answer for V4 {
    const PORT_UNREACHABLE: [u8; 2] = [3, 3];
    const TOO_BIG: [u8; 2] = [3, 4];
    const LEAST_MTU: u32 = 576;

    #[inline(always)]
    fn write_header<P: Reshape>(
        packet: &mut P,
        headers: &Headers<Self>,
        proto: Proto,
        payload: u32,
    ) -> Result<(), DropReason> {
        let [l0, l1] = ((Self::HDR_LEN + payload) as u16).to_be_bytes();
        let [s0, s1, s2, s3] = headers.tuple.dst;
        let [d0, d1, d2, d3] = headers.tuple.src;
        let sum = Sum::ZERO
            .word(u32::from_ne_bytes([0x45, 0, l0, l1]))
            .word(u32::from_ne_bytes([0, 0, 0x40, 0]))
            .word(u32::from_ne_bytes([HOP_LIMIT, proto.number, 0, 0]))
            .word(u32::from_ne_bytes(headers.tuple.dst))
            .word(u32::from_ne_bytes(headers.tuple.src));
        let [c0, c1] = sum.finish();
        packet.write(
            L3,
            &[
                0x45,
                0,
                l0,
                l1,
                0,
                0,
                0x40,
                0,
                HOP_LIMIT,
                proto.number,
                c0,
                c1,
                s0,
                s1,
                s2,
                s3,
                d0,
                d1,
                d2,
                d3,
            ],
        )
    }
}

impl Answer for V6 {
    const PORT_UNREACHABLE: [u8; 2] = [1, 4];
    const TOO_BIG: [u8; 2] = [2, 0];
    const LEAST_MTU: u32 = 1280;

    #[inline(always)]
    fn write_header<P: Reshape>(
        packet: &mut P,
        headers: &Headers<Self>,
        proto: Proto,
        payload: u32,
    ) -> Result<(), DropReason> {
        let [l0, l1] = (payload as u16).to_be_bytes();
        packet.write(L3, &[0x60, 0, 0, 0, l0, l1, proto.number, HOP_LIMIT])?;
        packet.write(L3 + Self::SRC_OFF, &headers.tuple.dst)?;
        packet.write(L3 + Self::DST_OFF, &headers.tuple.src)
    }
}

/// Turns the packet into its refusal.
///
/// # Errors
/// [`DropReason::NoEndpoint`] for what must not be answered, [`DropReason::Reject`] where the kernel refuses to
/// reshape the packet, [`DropReason::Rewrite`].
#[inline(always)]
pub fn reject<F: Answer, P: Reshape>(packet: &mut P, headers: &Headers<F>) -> Result<Verdict, DropReason> {
    if headers.tuple.proto == Proto::TCP {
        reset(packet, headers)?;
    } else {
        error(packet, headers, F::PORT_UNREACHABLE, 0)?;
    }
    turn_around(packet)?;
    Ok(Verdict::Reply)
}

/// RFC 9293 section 3.10.7.1: without ACK the reset acknowledges the segment, with ACK it takes its number from it.
#[inline(always)]
fn reset<F: Answer, P: Reshape>(packet: &mut P, headers: &Headers<F>) -> Result<(), DropReason> {
    if !conntrack::refusable(headers.flags) {
        return Err(DropReason::NoEndpoint);
    }
    let [_ports, old_seq, old_ack, control, _check] =
        packet.words::<{ TcpHdr::LEN / 4 }>(headers.l4).ok_or(DropReason::Truncated)?;
    let offset = u32::from(control.to_ne_bytes()[0] >> 4) * 4;
    let segment = headers.end.saturating_sub(headers.l4 + offset);
    let controls =
        u32::from(headers.flags.0 & Flags::SYN != 0) + u32::from(headers.flags.0 & Flags::FIN != 0);
    let (seq, ack, flags) = if headers.flags.0 & Flags::ACK != 0 {
        (old_ack.to_ne_bytes(), [0; 4], Flags::RST)
    } else {
        let ack = u32::from_be(old_seq).wrapping_add(segment).wrapping_add(controls);
        ([0; 4], ack.to_be_bytes(), Flags::RST | Flags::ACK)
    };
    packet.resize(L3 + F::HDR_LEN + TCP_LEN)?;
    F::write_header(packet, headers, Proto::TCP, TCP_LEN)?;
    let [s0, s1] = headers.tuple.dst_port.be;
    let [d0, d1] = headers.tuple.src_port.be;
    let sum = pseudo_header(headers, Proto::TCP, TCP_LEN)
        .word(u32::from_ne_bytes([s0, s1, d0, d1]))
        .word(u32::from_ne_bytes(seq))
        .word(u32::from_ne_bytes(ack))
        .word(u32::from_ne_bytes([0x50, flags, 0, 0]));
    let [c0, c1] = sum.finish();
    packet.write(
        L3 + F::HDR_LEN,
        &[
            s0, s1, d0, d1, seq[0], seq[1], seq[2], seq[3], ack[0], ack[1], ack[2], ack[3], 0x50, flags, 0,
            0, c0, c1, 0, 0,
        ],
    )
}

/// Turns the packet into an ICMP error about it: its IP header and the beginning of its transport header (RFC 792 asks for
/// eight bytes, RFC 4443 would like more), behind a new IP and ICMP header, whose last four bytes are `parameter`.
///
/// # Errors
/// [`DropReason::ExtensionHeaders`] where the headers are too long to be quoted; else as [`reject`].
#[inline(always)]
pub fn error<F: Answer, P: Reshape>(
    packet: &mut P,
    headers: &Headers<F>,
    [kind, code]: [u8; 2],
    parameter: u32,
) -> Result<(), DropReason> {
    let quote = headers.l4 - L3 + quoted(headers.tuple.proto);
    if quote > SUM_MAX {
        return Err(DropReason::ExtensionHeaders);
    }
    packet.resize(L3 + quote)?;
    packet.make_room(F::HDR_LEN + ICMP_LEN)?;
    F::write_header(packet, headers, F::ICMP, ICMP_LEN + quote)?;
    let icmp = L3 + F::HDR_LEN;
    let sum =
        if F::CSUM_OFF.is_some() { Sum::ZERO } else { pseudo_header(headers, F::ICMP, ICMP_LEN + quote) }
            .word(u32::from_ne_bytes([kind, code, 0, 0]))
            .word(parameter.to_be());
    let quoted = packet.sum(icmp + ICMP_LEN, quote).ok_or(DropReason::Reject)?;
    let [c0, c1] = sum.half(quoted.folded()).finish();
    let [p0, p1, p2, p3] = parameter.to_be_bytes();
    packet.write(icmp, &[kind, code, c0, c1, p0, p1, p2, p3])
}

/// How much of the transport header is quoted: to its checksum, since the kernel does not cut a packet before the place
/// where that is still to be written.
#[inline(always)]
const fn quoted(proto: Proto) -> u32 {
    if proto.number == Proto::TCP.number {
        TCP_LEN
    } else if proto.number == Proto::SCTP.number {
        SCTP_LEN
    } else {
        UdpHdr::LEN as u32
    }
}

/// SCTP's common header (RFC 9260 section 3.1).
const SCTP_LEN: u32 = 12;

/// The sum of the answer's pseudo-header (RFC 9293 section 3.1, RFC 8200 section 8.1): source and destination may
/// change places in it.
#[inline(always)]
fn pseudo_header<F: Family>(headers: &Headers<F>, proto: Proto, length: u32) -> Sum {
    let [s0, s1, s2, s3] = F::words(&headers.tuple.src);
    let [d0, d1, d2, d3] = F::words(&headers.tuple.dst);
    Sum::ZERO
        .word(s0)
        .word(s1)
        .word(s2)
        .word(s3)
        .word(d0)
        .word(d1)
        .word(d2)
        .word(d3)
        .word(length.to_be())
        .half(u16::from(proto.number).to_be())
}

/// Sends the packet back to whom it came from on the link.
///
/// # Errors
/// [`DropReason::Rewrite`], [`DropReason::Truncated`].
#[inline(always)]
pub fn turn_around<P: Reshape>(packet: &mut P) -> Result<(), DropReason> {
    let [first, second, third] =
        packet.words(offset_of!(EthHdr, dst_addr) as u32).ok_or(DropReason::Truncated)?;
    let [a, b, c, d] = first.to_ne_bytes();
    let [e, f, g, h] = second.to_ne_bytes();
    let [i, j, k, l] = third.to_ne_bytes();
    packet.write(0, &[g, h, i, j, k, l, a, b, c, d, e, f])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::{Frame, Macs, Names, Transport, both_families, verify};
    use crate::noise::world;
    use crate::tables::fake::Fake;

    both_families!(
        rule_14_a_segment_without_ack_is_acknowledged_by_its_reset,
        a_segment_with_ack_gives_its_reset_the_number,
        padding_is_not_acknowledged,
        a_reset_is_never_answered,
        rule_14_a_datagram_is_answered_by_port_unreachable,
        a_refusal_behind_options_or_extension_headers,
        rule_38_a_first_fragment_is_refused_and_the_rest_dropped,
        every_refusal_verifies,
    );

    const SEQ: u32 = 0xffff_fffe;

    fn segment<F: Names>(flags: u8, payload: &[u8]) -> Frame {
        let frame = Frame::tcp((F::pod(1), 4000), (F::vip(9), 80), flags).payload(payload);
        let ack = if flags & Flags::ACK != 0 { 77_000 } else { 0 };
        Frame { transport: Transport::Tcp { seq: SEQ, ack, flags, options: vec![1; 8] }, ..frame }
    }

    fn query<F: Names>() -> Frame {
        Frame::udp((F::pod(1), 4000), (F::vip(9), 53)).payload(b"a query of some length")
    }

    /// The reset that `frame` is to get.
    fn reset(frame: &Frame, seq: u32, ack: u32, flags: u8) -> Frame {
        let answer = frame.answer(flags).turned();
        Frame { transport: Transport::Tcp { seq, ack, flags, options: Vec::new() }, ..answer }
    }

    fn refused(frame: &Frame, fake: &Fake) -> Result<Vec<u8>, DropReason> {
        let (verdict, bytes) = frame.leave(fake)?;
        assert_eq!(verdict, Verdict::Reply);
        verify(&bytes).unwrap();
        Ok(bytes)
    }

    /// RFC 9293 section 3.10.7.1: "SEQ=0, ACK=SEG.SEQ+SEG.LEN, CTL=RST,ACK", where SYN and FIN count.
    fn rule_14_a_segment_without_ack_is_acknowledged_by_its_reset<F: Names>() {
        for (flags, payload, length) in [
            (Flags::SYN, &b""[..], 1),
            (Flags::SYN, b"fast open", 10),
            (Flags::SYN | Flags::FIN, b"", 2),
            (Flags::FIN, b"abc", 4),
            (0, b"abc", 3),
            (0, b"", 0),
        ] {
            let frame = segment::<F>(flags, payload);
            let expected = reset(&frame, 0, SEQ.wrapping_add(length), Flags::RST | Flags::ACK);
            assert_eq!(refused(&frame, &world()), Ok(expected.build()), "{flags:#x} {payload:?}");
        }
    }

    /// The same: "SEQ=SEG.ACK, CTL=RST".
    fn a_segment_with_ack_gives_its_reset_the_number<F: Names>() {
        for flags in [Flags::ACK, Flags::SYN | Flags::ACK, Flags::FIN | Flags::ACK, Flags::ACK | 8] {
            for payload in [&b""[..], b"payload"] {
                let frame = segment::<F>(flags, payload);
                let expected = reset(&frame, 77_000, 0, Flags::RST);
                assert_eq!(refused(&frame, &world()), Ok(expected.build()), "{flags:#x}");
            }
        }
    }

    /// A virtual machine's device may pad short frames: a number beyond what was sent would be ignored.
    fn padding_is_not_acknowledged<F: Names>() {
        let frame = Frame::tcp((F::pod(1), 4000), (F::vip(9), 80), Flags::SYN);
        let mut packet = frame.packet();
        packet.0.extend([0; 6]);
        assert_eq!(crate::pod::leaving(&mut packet, &world()), Ok(Verdict::Reply));
        assert_eq!(packet.0, reset(&frame, 0, 0x0102_0305, Flags::RST | Flags::ACK).build());
    }

    fn a_reset_is_never_answered<F: Names>() {
        for flags in [Flags::RST, Flags::RST | Flags::ACK, Flags::RST | Flags::SYN] {
            assert_eq!(refused(&segment::<F>(flags, b""), &world()), Err(DropReason::NoEndpoint));
        }
    }

    /// The packet's IP header and eight bytes, as they were.
    fn quote(frame: &Frame, header: usize) -> Frame {
        let (kind, code) = if header < 40 || frame.src.ip().is_ipv4() { (3, 3) } else { (1, 4) };
        let bytes = frame.build();
        let quoted = &bytes[L3 as usize..][..header + UdpHdr::LEN];
        let Macs { dst, src } = frame.macs;
        let answer = Frame::icmp(frame.dst, frame.src, kind, code).payload(quoted);
        Frame { macs: Macs { dst: src, src: dst }, ..answer }
    }

    fn rule_14_a_datagram_is_answered_by_port_unreachable<F: Names>() {
        for frame in [query::<F>(), query::<F>().payload(b""), query::<F>().payload(&[9; 1400])] {
            let expected = quote(&frame, F::HDR_LEN as usize);
            assert_eq!(refused(&frame, &world()), Ok(expected.build()));
        }
    }

    fn a_refusal_behind_options_or_extension_headers<F: Names>() {
        let more = if F::CSUM_OFF.is_some() { 8 } else { 24 };
        let frame = query::<F>().extended();
        let expected = quote(&frame, F::HDR_LEN as usize + more);
        assert_eq!(refused(&frame, &world()), Ok(expected.build()));
        let frame = segment::<F>(Flags::SYN, b"").extended();
        let answer = reset(&frame, 0, SEQ.wrapping_add(1), Flags::RST | Flags::ACK);
        assert_eq!(refused(&frame, &world()), Ok(answer.build()));
    }

    #[test]
    fn more_extension_headers_than_can_be_quoted_are_dropped_by_name() {
        let frame = Frame { extensions: vec![(60, 11)], ..query::<V6>() };
        assert_eq!(refused(&frame, &world()), Err(DropReason::ExtensionHeaders));
        let frame = Frame { extensions: vec![(60, 10)], ..query::<V6>() };
        assert_eq!(refused(&frame, &world()), Ok(quote(&frame, 120).build()));
    }

    fn rule_38_a_first_fragment_is_refused_and_the_rest_dropped<F: Names>() {
        let fake = world();
        let [first, later] = &query::<F>().payload(&[1; 64]).fragments(40)[..] else { panic!("two") };
        let (verdict, bytes) = first.leave(&fake).unwrap();
        assert_eq!(verdict, Verdict::Reply);
        verify(&bytes).unwrap();
        assert_eq!(later.leave(&fake), Err(DropReason::Fragment));
    }

    /// Every sum that a payload word can lead to.
    fn every_refusal_verifies<F: Names>() {
        let fake = world();
        for port in 0..=u16::MAX {
            let frame = Frame::udp((F::pod(1), port), (F::vip(9), 53));
            refused(&frame, &fake).unwrap();
            refused(
                &Frame { dst_port: 80, ..segment::<F>(Flags::SYN, b"") }.sent_from((F::pod(1), port)),
                &fake,
            )
            .unwrap();
        }
    }
}
