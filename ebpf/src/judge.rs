//! Whether policies let a new flow pass, and what is remembered of one that does.
//!
//! ```text
//!   known -- a flow of a service: choose -- judge -- track -- known
//!     |
//!     +-- of none, and policies apply to one of its ends: judge -- track it as it is -- known
//!                                                           |
//!                                                           +-- not as a first packet: as an answer?
//! ```
//!
//! A flow is judged once, where its first packet meets a program of a pod: what the sender's policies say of where it
//! goes, which is the chosen backend, and what the receiver's say of where it comes from, which is the client before any
//! masquerade (rule 47). A pod of another node is judged there. What passes is tracked, so that replies and all that
//! follows cost the lookup that they cost anyway (rule 48); a pod that no policy isolates tracks nothing.
//!
//! A packet in the middle of a connection that is not tracked (the table had no room, or no policy isolated the pod when
//! it began) passes where policies let it be opened by either end, and while the pod adopts what it had going when its
//! first policy came (rule 52). Where live flows are cut nothing is adopted, and who opened it is told by the ports, if
//! they tell; what is tracked is asked about again in [`crate::live`].
//!
//! A datagram does not show whether it is the middle of anything. One whose flow nobody tracked, because no policy isolated the
//! pod when that began, opens it: to let it pass for what it might be would let every new one pass for as long.
//!
//! What has no ports is judged by what policies say of no port: a rule without ports lets it pass (rule 45). Echoes are
//! flows by their identifier. Errors about a known flow belong to that flow, whatever policies say of ICMP; neighbour
//! discovery and the groups that it needs stay on the link, and pass (rule 39).

use ferroflow_common::abi::conntrack::Tuple;
use ferroflow_common::abi::node::Settings;
use ferroflow_common::abi::policy::{Class, EndpointPolicy, Verdict};
use ferroflow_common::addr::{Addr, Proto};
use ferroflow_common::family::Family;
use ferroflow_common::tcp::Flags;
use ferroflow_common::verdict::DropReason;

use crate::conntrack::{self, Epoch, Flow, Halves, INSERT_TRIES};
use crate::icmp::Errors;
use crate::live;
use crate::masquerade;
use crate::packet::{Packet, Reshape};
use crate::parse::{self, Parse};
use crate::policy::{self, Policies, Wanted};
use crate::reject::Answer;
use crate::service::{Origin, Outcome};
use crate::steps::Steps;
use crate::tables::{Services, Tables};

/// What judges need beside the tables.
pub trait Judges: Policies {
    /// Tells of a packet that passes, and that a policy in dry run would drop.
    fn would_drop(&self, reason: DropReason);

    /// See [`policy::allowed`]. In the kernel a function of its own, as the steps are.
    #[inline(always)]
    fn weigh(&self, set: u32, class: Class, wanted: Wanted) -> Verdict
    where
        Self: Sized,
    {
        policy::allowed(self, set, class, wanted)
    }
}

/// Whether policies apply to any pod of this node.
#[inline(always)]
pub fn is_in_session<T: Services>(tables: &T) -> bool {
    tables.settings() & Settings::POLICIES != 0
}

/// Whether policies have a say in an unknown flow of no service, or will in its replies.
#[inline(always)]
pub fn concerns<F: Family, T: Tables<F>>(tables: &T, tuple: &Tuple<F::Bytes>, origin: Origin) -> bool {
    if !is_in_session(tables) {
        return false;
    }
    let (src, dst) = (F::addr(tuple.src), F::addr(tuple.dst));
    if tables.endpoint(&dst).is_some_and(|row| row.is_isolated()) {
        return true;
    }
    // Nobody's policies are those of an address that is no pod's: where it matters nothing leaves by it.
    origin == Origin::Pod && !stays_on_link(&src) && tables.endpoint(&src).is_none_or(|row| row.is_isolated())
}

/// No router takes a packet from here (RFC 4291 sections 2.5.2 and 2.5.6).
#[inline(always)]
fn stays_on_link(addr: &Addr) -> bool {
    let [first, ..] = addr.words();
    addr.is_unspecified() || first & LINK_LOCAL_MASK == LINK_LOCAL
}

const LINK_LOCAL: u32 = u32::from_ne_bytes([0xfe, 0x80, 0, 0]);
const LINK_LOCAL_MASK: u32 = u32::from_ne_bytes([0xff, 0xc0, 0, 0]);
/// All groups have this first byte (RFC 4291 section 2.7).
const GROUP: u32 = u32::from_ne_bytes([0xff, 0, 0, 0]);

/// A flow of no service: [`Outcome::TRACKED`] where it passes.
#[inline(always)]
pub fn admit<F, P, T>(packet: &mut P, tables: &T, origin: Origin) -> Outcome
where
    F: Answer + Errors,
    P: Reshape,
    T: Steps<F, P>,
{
    let mut outcome = tables.judge(packet, Outcome::GUARDED, origin);
    if outcome.is_turned() {
        outcome = tables.judge(packet, outcome, origin);
    }
    if !outcome.is_admitted() {
        return outcome;
    }
    let admitted = outcome;
    for _ in 0..INSERT_TRIES {
        outcome = tables.track_plain(packet, admitted);
        if !outcome.is_refused_entry() {
            break;
        }
    }
    outcome
}

/// A packet without ports.
#[inline(always)]
pub fn admit_portless<F, P, T>(packet: &mut P, tables: &T, origin: Origin) -> Outcome
where
    F: Answer + Errors,
    P: Reshape,
    T: Steps<F, P>,
{
    let mut outcome = tables.portless(packet, origin);
    if outcome == Outcome::GUARDED {
        outcome = admit::<F, P, T>(packet, tables, origin);
    } else if outcome == Outcome::STALE {
        outcome = tables.judge(packet, outcome, origin);
    }
    if outcome == Outcome::TRACKED { Outcome::STACK } else { outcome }
}

/// [`Outcome::STACK`] where a packet without ports is of a flow that is known, or no policies have a say in it; else
/// [`Outcome::STALE`] or [`Outcome::GUARDED`].
///
/// # Errors
/// Why the packet is dropped.
#[inline(always)]
pub fn portless<F, P, T>(packet: &P, tables: &T, origin: Origin) -> Result<Outcome, DropReason>
where
    F: Errors,
    P: Packet,
    T: Tables<F>,
{
    if !is_in_session(tables) {
        return Ok(Outcome::STACK);
    }
    let Some(headers) = parse::flow::<F, P>(packet)? else { return Ok(Outcome::STACK) };
    if headers.tuple.proto == F::ICMP && is_of_link::<F, P, T>(packet, tables, headers.l4, headers.tuple.dst)
    {
        return Ok(Outcome::STACK);
    }
    match conntrack::followed::<F, T>(tables, &headers, Halves::Mended, Epoch::Compared) {
        Flow::Known(_row) => return Ok(Outcome::STACK),
        Flow::Stale => return Ok(Outcome::STALE),
        Flow::Unknown | Flow::Halved => {}
    }
    let concerned = concerns::<F, T>(tables, &headers.tuple, origin);
    Ok(if concerned { Outcome::GUARDED } else { Outcome::STACK })
}

/// Whether an ICMP message is one that makes the link work, and goes no further than that.
#[inline(always)]
fn is_of_link<F, P, T>(packet: &P, tables: &T, l4: u32, dst: F::Bytes) -> bool
where
    F: Errors,
    P: Packet,
    T: Tables<F>,
{
    let Some([message]) = packet.words(l4) else { return false };
    let dst = F::addr(dst);
    let [first, ..] = dst.words();
    F::is_of_link(message.to_ne_bytes()[0])
        && (stays_on_link(&dst) || first & GROUP == GROUP || tables.node_address(&dst).is_some())
}

/// Asks the policies of both ends. `flow` is the choice of a backend, which is given back; or [`Outcome::GUARDED`], which
/// becomes an outcome that [`track`] takes or, in the middle of a connection, one that is to be judged again. A flow that is
/// known, and [`Outcome::STALE`], is asked about as it was opened.
///
/// # Errors
/// [`DropReason::PolicyEgress`], [`DropReason::PolicyIngress`]; [`DropReason::NoBackend`].
#[inline(always)]
pub fn judge<F, P, T>(packet: &P, tables: &T, flow: Outcome, origin: Origin) -> Result<Outcome, DropReason>
where
    F: Parse,
    P: Packet,
    T: Tables<F> + Judges,
{
    let headers = parse::flow::<F, P>(packet)?.ok_or(DropReason::Truncated)?;
    let tuple = &headers.tuple;
    let lives = flow == Outcome::STALE;
    // Rule 49: the node's own processes always may, and are known by the way that the packet comes.
    if origin == Origin::Own && !lives {
        return Ok(flow.exempt());
    }
    // A reply of a flow that lives (rule 48).
    if origin == Origin::Inward && !lives && masquerade::answers::<F, T>(tables, tuple) {
        return Ok(Outcome::TRACKED);
    }
    // First: should policies change meanwhile, a live flow is asked about once more.
    let epoch = tables.epoch();
    let turned = flow.is_turned();
    let (mut from, mut to) = (F::addr(tuple.src), F::addr(tuple.dst));
    let mut port = tuple.dst_port;
    if lives {
        let Some(ends) = live::ends::<F, T>(tables, tuple) else { return Ok(flow.admitted()) };
        (from, to, port) = ends;
    } else if turned {
        (from, to) = (to, from);
        port = tuple.src_port;
    } else if flow.is_chosen() {
        let backend = tables.backend(flow.backend()).ok_or(DropReason::NoBackend)?;
        (to, port) = (backend.addr, backend.port);
    }
    let middle = !lives && !flow.is_chosen() && in_the_middle(tuple.proto, headers.flags);
    let (client, server) =
        if turned { (tuple.dst_port, tuple.src_port) } else { (tuple.src_port, tuple.dst_port) };
    let mut asked = if lives { Asked::LIVES } else { Asked::OPENS };
    if middle && live::are_exchanged(client, server) {
        asked = Asked::BACKWARDS;
    }
    let leaves = origin == Origin::Pod && !turned && !lives;
    let adopted_at = if middle { tables.now() } else { u32::MAX };
    // Whichever it is, what follows is followed once.
    let flow = flow.forgotten(packet);
    let question = Question {
        wanted: Wanted { proto: tuple.proto, port },
        leaves: packet.forget(u32::from(leaves)),
        adopted_at: packet.forget(adopted_at),
        asked: Asked(packet.forget(asked.0)),
    };
    // A pod and itself, directly or through a service (rule 49).
    let verdict =
        if from.words() == to.words() { Ok(()) } else { ask::<F, T>(tables, (&from, &to), &question) };
    match verdict {
        Ok(()) => {
            if flow == Outcome::STALE {
                live::mark::<F, T>(tables, tuple, epoch);
            }
            Ok(flow.admitted())
        }
        // With the reason for which it is dropped, should it be no answer either.
        Err(reason) if flow == Outcome::GUARDED && question.adopted_at != u32::MAX => {
            Ok(Outcome::turned(reason))
        }
        Err(reason) => Err(flow.reason_or(reason)),
    }
}

/// Whether a packet can only be of a connection that stands. What opens one and the answer to that come too soon to be
/// forgotten in between.
#[inline(always)]
fn in_the_middle(proto: Proto, flags: Flags) -> bool {
    proto.connects() && flags.0 & Flags::SYN == 0
}

/// What is asked of a flow.
struct Question {
    wanted: Wanted,
    /// Not 0: the sender is a pod of this node, whatever address it uses.
    leaves: u32,
    /// When the middle of a connection was seen; the end of time for a packet that opens one.
    adopted_at: u32,
    asked: Asked,
}

/// Why a flow is asked about. A number, so that the verifier can forget it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Asked(u32);

impl Asked {
    /// Nobody knows it.
    const OPENS: Self = Self(0);
    /// Nobody knows it, and its ports say that it was the other end that opened it.
    const BACKWARDS: Self = Self(1);
    /// It is established: only pods whose live flows are cut have a say.
    const LIVES: Self = Self(2);
}

impl Question {
    /// Whether a policy lets it pass that says this.
    #[inline(always)]
    fn passes<T: Judges>(&self, tables: &T, set: u32, row: &EndpointPolicy, peer: &Addr) -> Verdict {
        let cuts = row.live == EndpointPolicy::CUT;
        if cuts && self.asked == Asked::BACKWARDS {
            return Verdict::Deny;
        }
        if set == EndpointPolicy::OPEN || !cuts && self.asked == Asked::LIVES {
            return Verdict::Allow;
        }
        let class = policy::class_of(tables, peer);
        let verdict = tables.weigh(set, class, self.wanted);
        if verdict == Verdict::Deny && self.adopted_at < row.adopts_until { Verdict::Allow } else { verdict }
    }
}

/// Asks both ends, where pods of this node have their addresses.
#[inline(always)]
fn ask<F, T>(tables: &T, (from, to): (&Addr, &Addr), question: &Question) -> Result<(), DropReason>
where
    F: Family,
    T: Tables<F> + Judges,
{
    match tables.endpoint(from) {
        Some(row) => match question.passes(tables, row.policy.egress, &row.policy, to) {
            Verdict::Allow => {}
            Verdict::Deny => return Err(DropReason::PolicyEgress),
            Verdict::WouldDeny => tables.would_drop(DropReason::DryRunEgress),
        },
        None if question.leaves != 0 => return Err(DropReason::PolicyEgress),
        None => {}
    }
    let Some(row) = tables.endpoint(to) else { return Ok(()) };
    match question.passes(tables, row.policy.ingress, &row.policy, from) {
        Verdict::Allow => Ok(()),
        Verdict::Deny => Err(DropReason::PolicyIngress),
        Verdict::WouldDeny => {
            tables.would_drop(DropReason::DryRunIngress);
            Ok(())
        }
    }
}

/// Tracks a flow that was admitted: [`Outcome::TRACKED`].
///
/// # Errors
/// Why the packet is dropped.
#[inline(always)]
pub fn track<F, P, T>(packet: &P, tables: &T, admitted: Outcome) -> Result<Outcome, DropReason>
where
    F: Parse,
    P: Packet,
    T: Tables<F>,
{
    let headers = parse::flow::<F, P>(packet)?.ok_or(DropReason::Truncated)?;
    conntrack::open_plain(tables, &headers, admitted.opener())?;
    Ok(Outcome::TRACKED)
}

#[cfg(test)]
mod tests {
    use ferroflow_common::abi::conntrack::Entry;
    use ferroflow_common::abi::lb::{Frontend, FrontendKey};
    use ferroflow_common::abi::node::NodeAddress;
    use ferroflow_common::abi::policy::{PolicyKey, PortRange};
    use ferroflow_common::tcp::chunk;
    use ferroflow_common::verdict::Verdict as Goes;

    use super::*;
    use crate::frame::{Frame, Names, Part, Transport, both_families};
    use crate::tables::fake::Fake;

    both_families!(
        rule_48_both_ends_are_asked_and_replies_pass,
        rule_43_isolation_is_per_direction,
        rule_45_each_protocol_is_asked_by_its_own_ports,
        rule_45_what_has_no_ports_is_judged_by_no_port,
        rule_47_policies_see_the_backend_that_was_chosen,
        rule_47_policies_see_the_client_before_it_is_masqueraded,
        rule_49_the_nodes_own_packets_pass_and_are_known_by_their_path,
        rule_49_a_pod_reaches_itself,
        rule_37_errors_belong_to_their_flow,
        rule_38_fragments_follow_their_first,
        rule_52_a_known_flow_goes_on_and_a_new_one_is_asked_about,
        rule_52_the_middle_of_a_connection_may_be_either_ends,
        rule_52_what_a_pod_had_going_is_adopted_for_a_while,
        rule_54_nothing_passes_a_pod_that_is_closed,
        a_pod_without_policies_tracks_nothing,
        what_would_be_dropped_passes_and_is_told,
        a_sender_that_is_no_pod_sends_nothing,
        while_it_migrates_plain_flows_are_the_stacks,
        a_full_table_lets_nothing_new_pass,
        rule_36_an_insert_that_fails_for_a_moment_loses_nothing,
    );

    const SYN: u8 = Flags::SYN;
    const ACK: u8 = Flags::ACK;
    /// The class of pod 1, and of what pod 3 is.
    const FIRST: Class = 1;
    const THIRD: Class = 3;
    const SET: u32 = 5;
    const INGRESS: Result<(Goes, Vec<u8>), DropReason> = Err(DropReason::PolicyIngress);
    const EGRESS: Result<(Goes, Vec<u8>), DropReason> = Err(DropReason::PolicyEgress);

    /// Pods 1 and 2 are of this node, pod 3 is not.
    fn net<F: Names>() -> Fake {
        let mut fake = Fake::default();
        fake.local(F::pod(1), 11);
        fake.local(F::pod(2), 12);
        let node = F::vip(200);
        fake.node.insert(node, NodeAddress { flags: NodeAddress::NODE_PORTS });
        fake.settings = Some(Settings { flags: Settings::POLICIES, ..Settings::NONE });
        fake.policies.classes.insert(F::pod(1), FIRST);
        fake.policies.classes.insert(F::pod(3), THIRD);
        fake
    }

    fn isolate<F: Names>(fake: &mut Fake, pod: u8, ingress: u32, egress: u32) {
        let row = fake.endpoints.get_mut(&F::pod(pod)).unwrap();
        row.policy = EndpointPolicy { ingress, egress, adopts_until: 0, live: EndpointPolicy::FINISH };
    }

    /// A set that lets this protocol's port through where the other end is of the class, and nothing else.
    fn lay(fake: &mut Fake, set: u32, class: Class, proto: Proto, port: u16) {
        let verdict = Verdict::Allow as u8;
        let range = PortRange { first: port, last: port, proto, verdict, cause: 0 };
        fake.policies.lay(set, PolicyKey::OTHERS, Verdict::Deny, &[]);
        fake.policies.lay(set, class, Verdict::Deny, &[range]);
    }

    /// From a port of one pod to a port of another.
    fn between<F: Names>(from: u8, to: u8, port: u16) -> Frame {
        Frame::tcp((F::pod(from), 4000), (F::pod(to), port), SYN)
    }

    fn passes(frame: &Frame, goes: Goes) -> Result<(Goes, Vec<u8>), DropReason> {
        Ok((goes, frame.build()))
    }

    const TO_1: Goes = Goes::Pod { ifindex: 11 };
    const TO_2: Goes = Goes::Pod { ifindex: 12 };

    fn rule_48_both_ends_are_asked_and_replies_pass<F: Names>() {
        let mut fake = net::<F>();
        isolate::<F>(&mut fake, 1, EndpointPolicy::OPEN, 7);
        isolate::<F>(&mut fake, 2, SET, EndpointPolicy::OPEN);
        let request = between::<F>(1, 2, 80);
        lay(&mut fake, SET, FIRST, Proto::TCP, 80);
        assert_eq!(request.leave(&fake), EGRESS, "its own policies are asked, too");
        lay(&mut fake, 7, PolicyKey::OTHERS, Proto::TCP, 80);
        assert_eq!(request.leave(&fake), passes(&request, TO_2));
        for flags in [SYN | ACK, ACK] {
            let answer = request.answer(flags);
            assert_eq!(answer.leave(&fake), passes(&answer, TO_1));
        }
        let other = between::<F>(1, 2, 81);
        assert_eq!(other.leave(&fake), EGRESS);
        lay(&mut fake, 7, PolicyKey::OTHERS, Proto::TCP, 81);
        assert_eq!(other.leave(&fake), INGRESS);
        // The same from another node, through the stack.
        let request = between::<F>(3, 2, 80);
        assert_eq!(request.enter_pod(&fake, Origin::Inward), INGRESS);
        lay(&mut fake, SET, THIRD, Proto::TCP, 80);
        assert_eq!(request.enter_pod(&fake, Origin::Inward), passes(&request, Goes::Stack));
        let answer = request.answer(SYN | ACK);
        assert_eq!(answer.leave(&fake), passes(&answer, Goes::Stack));
    }

    fn rule_43_isolation_is_per_direction<F: Names>() {
        let mut fake = net::<F>();
        isolate::<F>(&mut fake, 2, EndpointPolicy::CLOSED, EndpointPolicy::OPEN);
        let out = between::<F>(2, 3, 80);
        assert_eq!(out.leave(&fake), passes(&out, Goes::Stack));
        let answer = out.answer(SYN | ACK);
        assert_eq!(answer.arrive(&fake), passes(&answer, Goes::Stack), "the program at the pod is asked");
        assert_eq!(answer.enter_pod(&fake, Origin::Inward), passes(&answer, Goes::Stack));
        let stranger = answer.clone().sent_from((F::pod(3), 81));
        assert_eq!(stranger.enter_pod(&fake, Origin::Inward), INGRESS);
        isolate::<F>(&mut fake, 2, EndpointPolicy::OPEN, EndpointPolicy::CLOSED);
        let request = between::<F>(3, 2, 80);
        assert_eq!(request.enter_pod(&fake, Origin::Inward), passes(&request, Goes::Stack));
        let answer = request.answer(SYN | ACK);
        assert_eq!(answer.leave(&fake), passes(&answer, Goes::Stack));
        assert_eq!(between::<F>(2, 3, 81).leave(&fake), EGRESS);
    }

    fn rule_45_each_protocol_is_asked_by_its_own_ports<F: Names>() {
        for allowed in [Proto::TCP, Proto::UDP, Proto::SCTP] {
            let mut fake = net::<F>();
            isolate::<F>(&mut fake, 2, SET, EndpointPolicy::OPEN);
            lay(&mut fake, SET, FIRST, allowed, 80);
            let (from, to) = ((F::pod(1), 4000), (F::pod(2), 80));
            for frame in [Frame::tcp(from, to, SYN), Frame::udp(from, to), Frame::sctp(from, to, chunk::INIT)]
            {
                let expected = if frame.proto() == allowed { passes(&frame, TO_2) } else { INGRESS };
                assert_eq!(frame.leave(&fake), expected, "{allowed}: {}", frame.proto());
                assert_eq!(frame.clone().extended().leave(&fake).is_ok(), expected.is_ok());
            }
        }
    }

    /// Of the two types of an echo.
    const REQUEST: usize = 0;
    const REPLY: usize = 1;

    fn echo<F: Names>(from: u8, to: u8, which: usize, id: u16) -> Frame {
        let kind = if F::pod(1).is_v4() { [8, 0] } else { [128, 129] }[which];
        let ends = ((F::pod(from), id), (F::pod(to), 0));
        Frame::new(ends.0, ends.1, Transport::Icmp { kind, code: 0, parameter: 0 }).payload(b"echo")
    }

    fn rule_45_what_has_no_ports_is_judged_by_no_port<F: Names>() {
        let mut fake = net::<F>();
        isolate::<F>(&mut fake, 2, SET, EndpointPolicy::CLOSED);
        fake.policies.lay(SET, PolicyKey::OTHERS, Verdict::Deny, &[]);
        let open = |port| PortRange { verdict: Verdict::Allow as u8, ..port };
        let all = PortRange { first: 0, last: 65535, proto: Proto::TCP, verdict: 0, cause: 0 };
        fake.policies.lay(SET, FIRST, Verdict::Deny, &[open(all)]);
        assert_eq!(echo::<F>(1, 2, REQUEST, 7).leave(&fake), INGRESS, "all ports of a protocol are not all");
        let esp = Frame::new((F::pod(1), 0), (F::pod(2), 0), Transport::Other(Proto { number: 50 }));
        assert_eq!(esp.leave(&fake), INGRESS);
        fake.policies.lay(SET, FIRST, Verdict::Allow, &[]);
        assert_eq!(esp.leave(&fake), passes(&esp, Goes::Stack));
        let request = echo::<F>(1, 2, REQUEST, 7);
        assert_eq!(echo::<F>(2, 1, REPLY, 7).leave(&fake), EGRESS, "nobody has asked");
        assert_eq!(request.leave(&fake), passes(&request, Goes::Stack));
        let reply = echo::<F>(2, 1, REPLY, 7);
        assert_eq!(reply.leave(&fake), passes(&reply, Goes::Stack));
        assert_eq!(echo::<F>(2, 1, REPLY, 8).leave(&fake), EGRESS);
        assert_eq!(echo::<F>(2, 1, REQUEST, 7).leave(&fake), EGRESS);
        assert_eq!(echo::<F>(3, 2, REQUEST, 7).enter_pod(&fake, Origin::Inward), INGRESS);
    }

    fn rule_47_policies_see_the_backend_that_was_chosen<F: Names>() {
        let mut fake = net::<F>();
        fake.service(F::vip(1), 80, Proto::TCP, &[(F::pod(2), 8080)]);
        fake.service(F::vip(2), 80, Proto::TCP, &[(F::pod(3), 8080)]);
        isolate::<F>(&mut fake, 1, EndpointPolicy::OPEN, SET);
        lay(&mut fake, SET, THIRD, Proto::TCP, 8080);
        let near = Frame::tcp((F::pod(1), 4000), (F::vip(1), 80), SYN);
        let far = near.clone().sent_to((F::vip(2), 80));
        assert_eq!(near.leave(&fake), EGRESS);
        assert!(fake.tracked().is_empty());
        assert_eq!(far.leave(&fake), passes(&far.clone().sent_to((F::pod(3), 8080)), Goes::Stack));
        assert_eq!(
            far.clone().sent_to((F::vip(2), 80)).leave(&fake).map(|(goes, _)| goes),
            Ok(Goes::Stack),
            "known by now"
        );
    }

    fn rule_47_policies_see_the_client_before_it_is_masqueraded<F: Names>() {
        let mut fake = net::<F>();
        let (node, client) = (F::vip(200), F::vip(99));
        let any = if node.is_v4() { FrontendKey::NODE_V4 } else { FrontendKey::NODE_V6 };
        fake.service(any, 30_080, Proto::TCP, &[(F::pod(1), 8080)]).flags = Frontend::NORTH_SOUTH;
        isolate::<F>(&mut fake, 1, SET, EndpointPolicy::OPEN);
        fake.policies.classes.insert(node, 8);
        lay(&mut fake, SET, 8, Proto::TCP, 8080);
        let request = Frame::tcp((client, 4000), (node, 30_080), SYN);
        assert_eq!(request.arrive(&fake), INGRESS, "only the node's own address may");
        fake.policies.classes.insert(client, 9);
        lay(&mut fake, SET, 9, Proto::TCP, 8080);
        assert_eq!(request.arrive(&fake).map(|(goes, _)| goes), Ok(TO_1));
    }

    fn rule_49_the_nodes_own_packets_pass_and_are_known_by_their_path<F: Names>() {
        let mut fake = net::<F>();
        isolate::<F>(&mut fake, 2, EndpointPolicy::CLOSED, EndpointPolicy::CLOSED);
        let node = F::vip(200);
        for src in [node, F::pod(9)] {
            let probe = Frame::tcp((src, 4000), (F::pod(2), 80), SYN);
            assert_eq!(probe.enter_pod(&fake, Origin::Inward), INGRESS, "whatever address it has");
            assert_eq!(probe.enter_pod(&fake, Origin::Own), passes(&probe, Goes::Stack));
            let answer = probe.answer(SYN | ACK);
            assert_eq!(answer.leave(&fake), passes(&answer, Goes::Stack));
        }
        let out = Frame::tcp((F::pod(2), 4000), (node, 22), SYN);
        assert_eq!(out.leave(&fake), EGRESS, "the node is a destination like others");
    }

    fn rule_49_a_pod_reaches_itself<F: Names>() {
        let mut fake = net::<F>();
        fake.service(F::vip(1), 80, Proto::TCP, &[(F::pod(1), 8080)]);
        isolate::<F>(&mut fake, 1, EndpointPolicy::CLOSED, EndpointPolicy::CLOSED);
        let there = Frame::tcp((F::pod(1), 4000), (F::vip(1), 80), SYN);
        let arrived = there.clone().sent_from((F::vip(1), 4000)).sent_to((F::pod(1), 8080));
        assert_eq!(there.leave(&fake), passes(&arrived, TO_1));
        let back = arrived.answer(SYN | ACK);
        assert_eq!(back.leave(&fake), passes(&there.answer(SYN | ACK), TO_1));
    }

    fn rule_37_errors_belong_to_their_flow<F: Names>() {
        let mut fake = net::<F>();
        isolate::<F>(&mut fake, 2, EndpointPolicy::CLOSED, SET);
        lay(&mut fake, SET, THIRD, Proto::TCP, 80);
        let request = between::<F>(2, 3, 80);
        let (kind, code) = if F::pod(1).is_v4() { (3, 4) } else { (2, 0) };
        let quote = |frame: &Frame| frame.build()[14..].to_vec();
        let error = |about: &Frame| Frame::icmp(F::vip(77), F::pod(2), kind, code).payload(&quote(about));
        assert_eq!(error(&request).enter_pod(&fake, Origin::Inward), INGRESS, "it is about nothing");
        assert_eq!(request.leave(&fake), passes(&request, Goes::Stack));
        let told = error(&request);
        assert_eq!(told.enter_pod(&fake, Origin::Inward), passes(&told, Goes::Stack));
        assert_eq!(error(&between::<F>(2, 3, 81)).enter_pod(&fake, Origin::Inward), INGRESS);
    }

    fn rule_38_fragments_follow_their_first<F: Names>() {
        for (port, passes) in [(53, true), (54, false)] {
            let mut fake = net::<F>();
            isolate::<F>(&mut fake, 2, SET, EndpointPolicy::OPEN);
            lay(&mut fake, SET, FIRST, Proto::UDP, 53);
            let datagram = Frame::udp((F::pod(1), 4000), (F::pod(2), port)).payload(&[7; 100]);
            for (number, part) in datagram.fragments(48).iter().enumerate() {
                assert_eq!(part.leave(&fake).is_ok(), passes, "fragment {number} to {port}");
            }
            let remote = datagram.sent_from((F::pod(3), 4000));
            lay(&mut fake, SET, THIRD, Proto::UDP, 53);
            for (number, part) in remote.fragments(48).iter().enumerate() {
                let entered = part.enter_pod(&fake, Origin::Inward);
                assert_eq!(entered.is_ok(), passes, "fragment {number} to {port} from another node");
            }
        }
        let mut fake = net::<F>();
        isolate::<F>(&mut fake, 2, EndpointPolicy::CLOSED, EndpointPolicy::OPEN);
        let first = echo::<F>(1, 2, REQUEST, 7).part(Part::First);
        assert_eq!(first.leave(&fake), INGRESS, "it has no ports, and is asked about");
    }

    fn rule_52_a_known_flow_goes_on_and_a_new_one_is_asked_about<F: Names>() {
        let mut fake = net::<F>();
        isolate::<F>(&mut fake, 2, SET, EndpointPolicy::OPEN);
        lay(&mut fake, SET, FIRST, Proto::TCP, 80);
        let request = between::<F>(1, 2, 80);
        assert!(request.leave(&fake).is_ok() && request.answer(SYN | ACK).leave(&fake).is_ok());
        isolate::<F>(&mut fake, 2, EndpointPolicy::CLOSED, EndpointPolicy::CLOSED);
        let (data, answer) = (Frame::tcp((F::pod(1), 4000), (F::pod(2), 80), ACK), request.answer(ACK));
        assert_eq!(data.leave(&fake), passes(&data, TO_2));
        assert_eq!(answer.leave(&fake), passes(&answer, TO_1));
        assert_eq!(request.leave(&fake), INGRESS, "the same ports, opened anew");
        assert!(fake.tracked().is_empty());
        assert_eq!(data.leave(&fake), INGRESS, "and with that it is over");
    }

    /// The table may have evicted it, or the pod was not isolated when it began.
    fn rule_52_the_middle_of_a_connection_may_be_either_ends<F: Names>() {
        let mut fake = net::<F>();
        isolate::<F>(&mut fake, 2, SET, EndpointPolicy::CLOSED);
        lay(&mut fake, SET, FIRST, Proto::TCP, 80);
        let answer = between::<F>(1, 2, 80).answer(ACK);
        assert_eq!(answer.leave(&fake), passes(&answer, TO_1), "pod 1 may have opened it");
        let entry = fake.entry((answer.src, 80), (answer.dst, 4000), Proto::TCP).unwrap();
        assert_eq!((entry.kind, entry.flags), (Entry::REPLY, Entry::PLAIN));
        let other = between::<F>(1, 2, 81).answer(ACK);
        assert_eq!(other.leave(&fake), EGRESS, "nobody may have opened it");
        for flags in [SYN, SYN | ACK] {
            let opens = Frame::tcp((F::pod(2), 80), (F::pod(1), 4001), flags);
            assert_eq!(opens.leave(&fake), EGRESS, "what opens is no answer");
        }
        let datagram = Frame::udp((F::pod(2), 80), (F::pod(1), 4000));
        assert_eq!(datagram.leave(&fake), EGRESS, "a datagram opens");
    }

    fn rule_52_what_a_pod_had_going_is_adopted_for_a_while<F: Names>() {
        let mut fake = net::<F>();
        isolate::<F>(&mut fake, 2, EndpointPolicy::CLOSED, EndpointPolicy::CLOSED);
        fake.endpoints.get_mut(&F::pod(2)).unwrap().policy.adopts_until = 500;
        for (now, passes) in [(1, true), (499, true), (500, false)] {
            fake.clock.set(now);
            fake.conntrack.take();
            for (frame, opens) in [
                (between::<F>(1, 2, 80).answer(ACK), false),
                (Frame::tcp((F::pod(1), 4000), (F::pod(2), 80), ACK), false),
                (between::<F>(1, 2, 81), true),
                (between::<F>(2, 1, 81), true),
                (between::<F>(1, 2, 82).answer(SYN | ACK), true),
                (Frame::udp((F::pod(1), 4000), (F::pod(2), 80)), true),
            ] {
                assert_eq!(frame.leave(&fake).is_ok(), passes && !opens, "at {now}: {frame:?}");
            }
        }
    }

    fn rule_54_nothing_passes_a_pod_that_is_closed<F: Names>() {
        let mut fake = net::<F>();
        isolate::<F>(&mut fake, 2, EndpointPolicy::CLOSED, EndpointPolicy::CLOSED);
        assert_eq!(between::<F>(1, 2, 80).leave(&fake), INGRESS);
        assert_eq!(between::<F>(3, 2, 80).enter_pod(&fake, Origin::Inward), INGRESS);
        assert_eq!(between::<F>(2, 1, 80).leave(&fake), EGRESS);
        assert_eq!(between::<F>(2, 3, 80).leave(&fake), EGRESS);
        assert!(fake.tracked().is_empty());
        // What the link needs (rule 39).
        if !F::pod(1).is_v4() {
            let mut group = [0; 16];
            (group[0], group[1], group[15]) = (0xff, 2, 1);
            for (dst, passes) in [(Addr::v6(group), true), (F::vip(200), true), (F::pod(3), false)] {
                let solicitation = Frame::icmp(F::pod(2), dst, 135, 0).payload(&[0; 20]);
                assert_eq!(solicitation.leave(&fake).is_ok(), passes, "{dst}");
            }
        }
    }

    fn a_pod_without_policies_tracks_nothing<F: Names>() {
        let mut fake = net::<F>();
        isolate::<F>(&mut fake, 2, EndpointPolicy::CLOSED, EndpointPolicy::CLOSED);
        fake.local(F::pod(4), 14);
        let frames = [between::<F>(1, 4, 80), between::<F>(1, 3, 80), echo::<F>(1, 4, REQUEST, 7)];
        for frame in &frames {
            assert!(frame.leave(&fake).is_ok());
        }
        let from_far = between::<F>(3, 1, 80);
        assert_eq!(from_far.enter_pod(&fake, Origin::Inward), passes(&from_far, Goes::Stack));
        assert!(fake.tracked().is_empty());
        // Where no pod has policies nothing more is looked up than without any of this.
        fake.settings = Some(Settings::NONE);
        fake.lookups.take();
        assert!(between::<F>(1, 4, 80).leave(&fake).is_ok());
        assert_eq!(fake.lookups.take().hash, 4, "a flow, a frontend, a flow that it would shadow, a pod");
        assert!(from_far.enter_pod(&fake, Origin::Inward).is_ok());
        assert_eq!(fake.lookups.take().hash, 1, "a flow");
    }

    fn what_would_be_dropped_passes_and_is_told<F: Names>() {
        let mut fake = net::<F>();
        isolate::<F>(&mut fake, 1, EndpointPolicy::OPEN, 7);
        isolate::<F>(&mut fake, 2, SET, EndpointPolicy::OPEN);
        fake.policies.lay(SET, PolicyKey::OTHERS, Verdict::WouldDeny, &[]);
        fake.policies.lay(7, PolicyKey::OTHERS, Verdict::WouldDeny, &[]);
        let request = between::<F>(1, 2, 80);
        for _ in 0..2 {
            assert_eq!(request.leave(&fake), passes(&request, TO_2));
        }
        assert_eq!(*fake.would_drop.borrow(), [DropReason::DryRunEgress, DropReason::DryRunIngress]);
    }

    fn a_sender_that_is_no_pod_sends_nothing<F: Names>() {
        let mut fake = net::<F>();
        let forged = between::<F>(9, 3, 80);
        assert_eq!(forged.leave(&fake), EGRESS);
        fake.settings = Some(Settings::NONE);
        assert_eq!(forged.leave(&fake), passes(&forged, Goes::Stack), "nobody's policies are evaded");
    }

    fn while_it_migrates_plain_flows_are_the_stacks<F: Names>() {
        let mut fake = net::<F>();
        let flags = Settings::POLICIES | Settings::MIGRATING;
        fake.settings = Some(Settings { flags, ..Settings::NONE });
        isolate::<F>(&mut fake, 2, SET, EndpointPolicy::OPEN);
        lay(&mut fake, SET, FIRST, Proto::TCP, 80);
        let request = between::<F>(1, 2, 80);
        for _ in 0..2 {
            assert_eq!(request.leave(&fake), passes(&request, Goes::Stack));
        }
    }

    fn rule_36_an_insert_that_fails_for_a_moment_loses_nothing<F: Names>() {
        let mut fake = net::<F>();
        isolate::<F>(&mut fake, 2, SET, EndpointPolicy::OPEN);
        lay(&mut fake, SET, FIRST, Proto::TCP, 80);
        for refusals in 0..INSERT_TRIES {
            fake.refusals.set(refusals);
            let request = between::<F>(1, 2, 80);
            assert_eq!(request.leave(&fake), passes(&request, TO_2), "{refusals} refusals");
            fake.conntrack.borrow_mut().clear();
        }
    }

    fn a_full_table_lets_nothing_new_pass<F: Names>() {
        let mut fake = net::<F>();
        isolate::<F>(&mut fake, 2, SET, EndpointPolicy::OPEN);
        lay(&mut fake, SET, FIRST, Proto::TCP, 80);
        for room in 0..2 {
            fake.room.set(Some(room));
            assert_eq!(between::<F>(1, 2, 80).leave(&fake), Err(DropReason::ConntrackInsert));
            assert!(fake.tracked().is_empty());
        }
    }
}
