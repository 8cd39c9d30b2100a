//! The programs in the kernel on single packets: the same cases and the same noise as the library on the host.
#![forbid(unsafe_code)]

use std::process::{Command, ExitCode};

use anyhow::{Context as _, Result, ensure};
use bpf_tests::{
    run::{Action, Constants, DEFAULTS, Program, Programs, Wide, thrown},
    runner,
    sandbox::Sandbox,
};
use ferroflow_common::{
    abi::conntrack::Entry,
    addr::Addr,
    family::{V4, V6},
    tcp::{Flags, chunk},
    verdict::DropReason,
};
use ferroflow_ebpf::{
    frame::{Frame, Names, Socket, Transport, UdpChecksum},
    noise::{Noise, guarded_world, world},
    tables::fake::Fake,
};
use serde_json::Value;

fn main() -> ExitCode {
    runner::main(&[
        ("cases_of_ipv4", |sandbox| every_case::<V4>(sandbox)),
        ("cases_of_ipv6", |sandbox| every_case::<V6>(sandbox)),
        ("kernel_and_library_agree_on_noise", kernel_and_library_agree_on_noise),
        ("kernel_and_library_agree_on_policies", kernel_and_library_agree_on_policies),
        ("every_program_loads_with_every_constant", every_program_loads_with_every_constant),
        ("bpftool_shows_the_tables_by_name", bpftool_shows_the_tables_by_name),
    ])
}

/// One packet, after others, and what becomes of it. The tables are [`world`]'s.
struct Case {
    name: &'static str,
    /// What came before, through `pod_egress`.
    after: Vec<Frame>,
    program: Program,
    packet: Vec<u8>,
    becomes: Outcome,
}

/// A packet that goes where the action says, as these bytes; or is dropped, for this reason.
enum Outcome {
    Goes(Action, Vec<u8>),
    Dropped(DropReason),
}

impl Case {
    fn new(name: &'static str, frame: &Frame, becomes: Outcome) -> Self {
        Self { name, after: Vec::new(), program: Program::PodEgress, packet: frame.build(), becomes }
    }

    fn after(self, after: &[&Frame]) -> Self {
        Self { after: after.iter().map(|&frame| frame.clone()).collect(), ..self }
    }

    fn entering(self) -> Self {
        Self { program: Program::PodIngress, ..self }
    }

    fn bytes(self, packet: Vec<u8>) -> Self {
        Self { packet, ..self }
    }

    fn outcome(&self) -> (Action, &[u8]) {
        match &self.becomes {
            Outcome::Goes(action, bytes) => (*action, bytes),
            Outcome::Dropped(_) => (Action::Drop, &self.packet),
        }
    }
}

const SYN: u8 = Flags::SYN;
const ACK: u8 = Flags::ACK;

fn to_pod(frame: &Frame) -> Outcome {
    Outcome::Goes(Action::Redirect, frame.build())
}

fn to_stack(frame: &Frame) -> Outcome {
    Outcome::Goes(Action::Next, frame.build())
}

/// The ends that the cases are made of. Pods 1 and 2 are local, pod 3 is remote.
struct Ends {
    client: Socket,
    local: Socket,
    remote: Socket,
    /// Of the local pod alone.
    near: Socket,
    /// Of the remote pod alone.
    far: Socket,
    drops: Socket,
    refuses: Socket,
}

impl Ends {
    fn new<F: Names>(port: u16, target: u16) -> Self {
        Self {
            client: (F::pod(1), 4000),
            local: (F::pod(2), target),
            remote: (F::pod(3), target),
            near: (F::vip(2), port),
            far: (F::vip(3), port),
            drops: (F::vip(8), port),
            refuses: (F::vip(9), port),
        }
    }
}

fn cases<F: Names>() -> Vec<Case> {
    let tcp = Ends::new::<F>(80, 8080);
    let udp = Ends::new::<F>(53, 5353);
    let mut cases = Vec::new();
    cases.extend(served(&tcp, &Frame::tcp(tcp.client, tcp.near, SYN)));
    cases.extend(served(&udp, &Frame::udp(udp.client, udp.near).payload(b"query")));
    cases.extend(served(&tcp, &Frame::tcp(tcp.client, tcp.near, SYN).extended()));
    cases.extend(served(&udp, &Frame::udp(udp.client, udp.near).extended().payload(&[3; 1200])));
    let sctp = Ends::new::<F>(38412, 3868);
    let init = Frame::sctp(sctp.client, sctp.near, chunk::INIT);
    cases.extend(served(&sctp, &init.clone().payload(b"initial parameters")));
    cases.extend(served(&sctp, &init.extended().payload(&[9; 1300])));
    cases.extend(associations(&sctp));
    cases.extend(connections(&tcp));
    cases.extend(looped::<F>(&tcp));
    cases.extend(refused(&tcp, &udp));
    cases.extend(left_alone(&tcp, &udp));
    cases.extend(fragments::<F>(&udp));
    cases.extend(errors::<F>(&tcp, &Frame::tcp(tcp.client, tcp.far, SYN).payload(b"data")));
    cases.extend(errors::<F>(&udp, &Frame::udp(udp.client, udp.far).extended().payload(b"query")));
    cases.extend(malformed(&tcp));
    cases
}

/// There and back, for any protocol; `first` goes from the client to the near service.
fn served(ends: &Ends, first: &Frame) -> Vec<Case> {
    let far = first.clone().sent_to(ends.far);
    let answer = first.answer(SYN | ACK);
    let far_answer = far.answer(SYN | ACK);
    let from_local = answer.clone().sent_from(ends.local);
    let from_remote = far_answer.clone().sent_from(ends.remote);
    vec![
        Case::new("new flow to a local pod", first, to_pod(&first.clone().sent_to(ends.local))),
        Case::new("known flow to a local pod", first, to_pod(&first.clone().sent_to(ends.local)))
            .after(&[first]),
        Case::new("new flow to a remote pod", &far, to_stack(&far.clone().sent_to(ends.remote))),
        Case::new("known flow to a remote pod", &far, to_stack(&far.clone().sent_to(ends.remote)))
            .after(&[&far]),
        Case::new("reply of a local pod", &from_local, to_pod(&answer)).after(&[first]),
        Case::new("reply of a remote pod", &from_remote, to_stack(&far_answer)).after(&[&far]).entering(),
        Case::new("a stranger's packet", &from_remote, to_stack(&from_remote)).entering(),
        Case::new(
            "endpoints elsewhere",
            &first.clone().sent_to(ends.drops),
            dropped(DropReason::NoLocalEndpoint),
        ),
        Case::new(
            "pod to local pod",
            &first.clone().sent_to(ends.local),
            to_pod(&first.clone().sent_to(ends.local)),
        ),
        Case::new(
            "pod to remote pod",
            &far.clone().sent_to(ends.remote),
            to_stack(&far.sent_to(ends.remote)),
        ),
    ]
}

fn dropped(reason: DropReason) -> Outcome {
    Outcome::Dropped(reason)
}

/// What only TCP has.
fn connections(ends: &Ends) -> Vec<Case> {
    let syn = Frame::tcp(ends.client, ends.near, SYN);
    let reset = Frame::tcp(ends.client, ends.near, Flags::RST);
    let data = Frame::tcp(ends.client, ends.near, ACK | 8).payload(b"GET / HTTP/1.1\r\n\r\n");
    let own = Frame::tcp(ends.local, ends.client, SYN);
    let own_later = Frame::tcp(ends.local, ends.client, ACK);
    let there = |frame: &Frame| to_pod(&frame.clone().sent_to(ends.local));
    let other = syn.clone().sent_to((ends.far.0, ends.far.1));
    vec![
        Case::new("data on a connection", &data, there(&data)).after(&[&syn]),
        Case::new("data without a connection", &data, there(&data)),
        Case::new("reset of a connection", &reset, there(&reset)).after(&[&syn]),
        Case::new("SYN after the reset", &syn, there(&syn)).after(&[&syn, &reset]),
        Case::new("a server opens to its client", &own, to_pod(&own)).after(&[&syn, &reset]),
        Case::new("and goes on", &own_later, to_pod(&own_later)).after(&[&syn, &reset, &own]),
        Case::new("another service", &other, to_stack(&other.clone().sent_to(ends.remote))).after(&[&syn]),
    ]
}

/// What only SCTP has.
fn associations(ends: &Ends) -> Vec<Case> {
    let frame = |kind| Frame::sctp(ends.client, ends.near, kind).payload(b"chunk");
    let there = |frame: &Frame| to_pod(&frame.clone().sent_to(ends.local));
    let (init, data, abort) = (frame(chunk::INIT), frame(chunk::DATA), frame(chunk::ABORT));
    let computed_later = |frame: &Frame| {
        let mut bytes = frame.build();
        let check = bytes.len() - frame.payload.len() - 8;
        bytes[check..check + 4].copy_from_slice(&[0; 4]);
        bytes
    };
    let later = Outcome::Goes(Action::Redirect, computed_later(&init.clone().sent_to(ends.local)));
    let refused = init.clone().sent_to(ends.refuses);
    vec![
        Case::new("data on an association", &data, there(&data)).after(&[&init]),
        Case::new("abort of an association", &abort, there(&abort)).after(&[&init]),
        Case::new("INIT after the abort", &init, there(&init)).after(&[&init, &abort]),
        Case::new("a checksum left to the device", &init, later).bytes(computed_later(&init)),
        Case::new("no endpoints: INIT", &refused, port_unreachable(&refused, 0)),
    ]
}

/// The ICMP error in answer. It quotes the IP header, with `units` of eight bytes of options (IPv4) or 24 of extension
/// headers (IPv6), and eight bytes behind it.
fn port_unreachable(frame: &Frame, units: usize) -> Outcome {
    let v4 = frame.src.ip().is_ipv4();
    let (header, (kind, code)) = if v4 { (20 + 8 * units, (3, 3)) } else { (40 + 24 * units, (1, 4)) };
    // Of SCTP all that is before the first chunk.
    let length = header + if frame.proto() == ferroflow_common::addr::Proto::SCTP { 12 } else { 8 };
    let quote = frame.build()[14..14 + length].to_vec();
    to_pod(&Frame::icmp(frame.dst, frame.src, kind, code).payload(&quote).turned())
}

/// A pod that is its own backend.
fn looped<F: Names>(ends: &Ends) -> Vec<Case> {
    let there = Frame::tcp((F::pod(2), 4000), ends.near, SYN);
    let arrived = there.clone().sent_from((ends.near.0, 4000)).sent_to(ends.local);
    let back = arrived.answer(SYN | ACK);
    vec![
        Case::new("a pod to itself", &there, to_pod(&arrived)),
        Case::new("a pod to itself again", &there, to_pod(&arrived)).after(&[&there]),
        Case::new("and its answer", &back, to_pod(&there.answer(SYN | ACK))).after(&[&there]),
    ]
}

fn refused(tcp: &Ends, udp: &Ends) -> Vec<Case> {
    let transport = |seq, ack, flags| Transport::Tcp { seq, ack, flags, options: Vec::new() };
    let reset = |frame: &Frame, seq, ack, flags| {
        to_pod(&Frame { transport: transport(seq, ack, flags), ..frame.answer(flags).turned() })
    };
    let syn = Frame::tcp(tcp.client, tcp.refuses, SYN);
    let ack = Frame::tcp(tcp.client, tcp.refuses, ACK).payload(b"late");
    let rst = Frame::tcp(tcp.client, tcp.refuses, Flags::RST);
    let acked = 0x0102_0305;
    let mut cases = vec![
        Case::new("no endpoints: SYN", &syn, reset(&syn, 0, acked, Flags::RST | ACK)),
        Case::new(
            "no endpoints: SYN with data",
            &syn.clone().payload(b"12345"),
            reset(&syn, 0, acked + 5, Flags::RST | ACK),
        ),
        Case::new("no endpoints: ACK", &ack, reset(&ack, 0xa0b0_c0d0, 0, Flags::RST)),
        Case::new("no endpoints: RST", &rst, dropped(DropReason::NoEndpoint)),
        Case::new(
            "no endpoints: SYN with options",
            &syn.clone().extended(),
            reset(&syn, 0, acked, Flags::RST | ACK),
        ),
        Case::new("no endpoints: padded SYN", &syn, reset(&syn, 0, acked, Flags::RST | ACK))
            .bytes([syn.build(), vec![0; 6]].concat()),
    ];
    for (name, frame, header) in [
        ("no endpoints: datagram", Frame::udp(udp.client, udp.refuses).payload(&[7; 500]), 0),
        ("no endpoints: empty datagram", Frame::udp(udp.client, udp.refuses), 0),
        ("no endpoints: datagram with options", Frame::udp(udp.client, udp.refuses).extended(), 1),
    ] {
        cases.push(Case::new(name, &frame, port_unreachable(&frame, header)));
    }
    cases
}

/// Packets that are none of our business, and datagrams that need care.
fn left_alone(tcp: &Ends, udp: &Ends) -> Vec<Case> {
    let port = Frame::tcp(tcp.client, (tcp.near.0, 443), SYN);
    let ping = Frame::icmp(tcp.client.0, tcp.near.0, 8, 0);
    let arp = [&[0xff; 12][..], &[8, 6], &[0; 28]].concat();
    let vlan = [&[2; 12][..], &[0x81, 0, 0, 1, 8, 0], &[0x45; 40]].concat();
    let plain = |bytes: &[u8]| Outcome::Goes(Action::Next, bytes.to_vec());
    let none = Transport::Udp { checksum: UdpChecksum::None };
    let query = Frame::new(udp.client, udp.near, none).payload(b"query");
    let far = query.clone().sent_to(udp.far);
    vec![
        Case::new("another port of a service", &port, to_stack(&port)),
        Case::new("ping of a service", &ping, to_stack(&ping)),
        Case::new("ARP", &ping, plain(&arp)).bytes(arp.clone()),
        Case::new("ARP", &ping, plain(&arp)).bytes(arp).entering(),
        Case::new("VLAN", &ping, plain(&vlan)).bytes(vlan),
        Case::new("datagram without checksum", &query, to_pod(&query.clone().sent_to(udp.local))),
        Case::new("known flow without checksum", &far, to_stack(&far.clone().sent_to(udp.remote)))
            .after(&[&far]),
    ]
}

/// Rule 38. The programs know of datagrams from case to case, so each has an identification of its own.
fn fragments<F: Names>(udp: &Ends) -> Vec<Case> {
    let mut id = 0;
    let mut cases = Vec::new();
    let mut add = |name, frame: &Frame, order: &[usize], becomes: &dyn Fn(&[Frame]) -> Outcome| {
        id += 1;
        let parts = Frame { id, ..frame.clone() }.fragments(40);
        let (last, before) = order.split_last().expect("a case has a packet");
        let before: Vec<_> = before.iter().map(|index| &parts[*index]).collect();
        cases.push(Case::new(name, &parts[*last], becomes(&parts)).after(&before));
    };
    let far = Frame::udp(udp.client, udp.far).payload(&[6; 140]);
    let there = |parts: &[Frame], index: usize| parts[index].clone().sent_to(udp.remote);
    let taken = |parts: &[Frame], index: usize| Outcome::Goes(Action::Drop, parts[index].build());
    // What the first one becomes has the checksum of all.
    let whole = |id| Frame { id, ..far.clone().sent_to(udp.remote) }.fragments(40);
    add("first fragment", &far, &[0], &|_| to_stack(&whole(1)[0]));
    add("second fragment", &far, &[0, 1], &|parts| to_stack(&there(parts, 1)));
    add("last fragment", &far, &[0, 3], &|parts| to_stack(&there(parts, 3)));
    add("early fragment", &far, &[3], &|parts| taken(parts, 3));
    add("another early fragment", &far, &[3, 2], &|parts| taken(parts, 2));
    add("first fragment after others", &far, &[3, 2, 0], &|_| to_stack(&whole(6)[0]));
    add("its copy is the one that came last", &far, &[3, 2, 0, 0], &|parts| to_stack(&there(parts, 2)));
    add("and then the one before", &far, &[3, 2, 0, 0, 0], &|parts| to_stack(&there(parts, 3)));
    let direct = far.clone().sent_to((F::pod(3), 9));
    add("first fragment for a pod", &direct, &[0], &|parts| to_stack(&parts[0]));
    add("later fragment for a pod", &direct, &[0, 1], &|parts| to_stack(&parts[1]));
    add("early fragment for a pod", &direct, &[1], &|parts| taken(parts, 1));
    add("which goes on with a copy of the first", &direct, &[1, 0, 0], &|parts| to_stack(&parts[1]));
    let drops = far.clone().sent_to(udp.drops);
    add("first fragment, endpoints elsewhere", &drops, &[0], &|_| dropped(DropReason::NoLocalEndpoint));
    let ping = Frame::icmp(udp.client.0, udp.far.0, 8, 0).payload(&[0; 140]);
    add("later fragment of a ping", &ping, &[2], &|parts| to_stack(&parts[2]));
    let reply = far.answer(0).payload(&[4; 140]);
    let sent = reply.clone().sent_from(udp.remote);
    let parts = |frame: &Frame| Frame { id: 100, ..frame.clone() }.fragments(40);
    let entering = Case::new("first fragment of a reply", &parts(&sent)[0], to_stack(&parts(&reply)[0]));
    cases.push(entering.after(&[&far]).entering());
    cases
}

/// Rule 37: from the backend itself, from a router, about the reply, and about nothing that is known.
fn errors<F: Names>(ends: &Ends, first: &Frame) -> Vec<Case> {
    let v4 = first.src.ip().is_ipv4();
    let kinds: &[(u8, u8)] = if v4 { &[(3, 4), (11, 0), (12, 0)] } else { &[(1, 4), (2, 0), (3, 0), (4, 0)] };
    let more: usize = first.extensions.iter().map(|(_, units)| usize::from(*units) * 8).sum();
    let least = if v4 { 28 + first.options.len() } else { 48 + more };
    let far = first.clone().sent_to(ends.far);
    let there = far.clone().sent_to(ends.remote);
    let answer = far.answer(SYN | ACK);
    let answered = answer.clone().sent_from(ends.remote);
    let router = F::vip(200);
    let mut cases = Vec::new();
    for &kind in kinds {
        for quoted in [1_500, least] {
            let error = |from, about: &Frame| {
                let bytes = about.build();
                let quoted = quoted.min(bytes.len() - 14);
                Frame::icmp(from, about.src, kind.0, kind.1).payload(&bytes[14..14 + quoted])
            };
            let mut add = |name, came: Frame, becomes: Frame| {
                let entering = Case::new(name, &came, to_stack(&becomes)).after(&[&far]).entering();
                cases.push(entering);
            };
            add("error of a router", error(router, &there), error(router, &far));
            add("error of the backend", error(ends.remote.0, &there), error(ends.far.0, &far));
            add("error about what was not sent on", error(router, &far), error(router, &far));
            let (came, becomes) = (error(ends.client.0, &answer), error(ends.client.0, &answered));
            cases.push(Case::new("error of the client", &came, to_stack(&becomes)).after(&[&far]));
            cases.push(Case::new("error about nothing known", &came, to_stack(&came)));
        }
    }
    cases
}

fn malformed(ends: &Ends) -> Vec<Case> {
    let syn = Frame::tcp(ends.client, ends.near, SYN);
    let long = Frame { extensions: vec![(60, 1); 7], options: vec![1; 40], ..syn.clone() };
    let whole = syn.build();
    let mut lying = whole.clone();
    let length = if syn.src.ip().is_ipv4() { 16 } else { 18 };
    lying[length + 1] += 1;
    let mut version = whole.clone();
    version[14] = 0x55;
    let cut = |length: usize| whole[..length].to_vec();
    let truncated = |name, bytes| Case::new(name, &syn, dropped(DropReason::Truncated)).bytes(bytes);
    let chain = if syn.src.ip().is_ipv4() {
        Case::new("forty bytes of options", &long, to_pod(&long.clone().sent_to(ends.local)))
    } else {
        Case::new("too many extension headers", &long, dropped(DropReason::ExtensionHeaders))
    };
    vec![
        chain,
        truncated("cut in the TCP header", cut(whole.len() - 1)),
        truncated("a length that lies", lying),
        truncated("another version", version),
    ]
}

fn every_case<F: Names>(sandbox: &Sandbox) -> Result<()> {
    let mut programs = Programs::load(&sandbox.place()?, DEFAULTS)?;
    programs.fill(&world())?;
    let cases = cases::<F>();
    ensure!(cases.len() > 60, "{} cases", cases.len());
    let failures: Vec<String> = cases
        .iter()
        .filter_map(|case| {
            run_case(&mut programs, case).err().map(|error| format!("{}: {error:#}", case.name))
        })
        .collect();
    ensure!(failures.is_empty(), "{} of {} cases:\n{}", failures.len(), cases.len(), failures.join("\n"));
    println!("{} cases", cases.len());
    Ok(())
}

fn run_case(programs: &mut Programs, case: &Case) -> Result<()> {
    let fake = world();
    fake.clock.set(Programs::now()?);
    programs.set_tracked(&fake.tracked())?;
    for frame in &case.after {
        programs.run(Program::PodEgress, &frame.build())?;
        ensure!(frame.leave(&fake).is_ok(), "what came before was dropped");
    }
    let before = programs.drops()?;
    let kernel = programs.run(case.program, &case.packet)?;
    let dropped: Vec<_> = programs.drops()?.into_iter().filter(|count| !before.contains(count)).collect();
    let (verdict, bytes) = case.program.on_host(&case.packet, &fake);
    let (action, expected) = case.outcome();
    same("kernel", &kernel, &(action, expected.to_vec()))?;
    same("library", &(verdict.into(), bytes), &(action, expected.to_vec()))?;
    let reasons: Vec<_> = dropped.iter().map(|(reason, _)| *reason).collect();
    let reason: Vec<_> = match case.becomes {
        Outcome::Dropped(reason) => vec![reason],
        Outcome::Goes(..) => vec![],
    };
    ensure!(reasons == reason, "counted as {reasons:?}, not {reason:?}");
    ensure!(verdict.err().as_slice() == reason, "the library says {verdict:?}");
    compare_tracked(programs, &fake)
}

fn same(who: &str, seen: &(Action, Vec<u8>), expected: &(Action, Vec<u8>)) -> Result<()> {
    ensure!(seen.0 == expected.0, "{who}: {:?}, not {:?}", seen.0, expected.0);
    ensure!(seen.1 == expected.1, "{who}:\n  {}\nnot\n  {}", hex(&seen.1), hex(&expected.1));
    Ok(())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The connection tables hold the same; the clock may have gone on by a second between the two.
fn compare_tracked(programs: &Programs, fake: &Fake) -> Result<()> {
    let (kernel, host) = (programs.tracked()?, fake.tracked());
    let timeless = |entry: &Entry| Entry { expires: 0, ..*entry };
    for (tuple, entry) in &kernel {
        let other = host.get(tuple).with_context(|| format!("only the kernel has {tuple:?}: {entry:?}"))?;
        let apart = entry.expires.abs_diff(other.expires);
        ensure!(
            timeless(entry) == timeless(other) && apart <= 1,
            "{tuple:?}:\n  kernel {entry:?}\n  library {other:?}"
        );
    }
    let missing = host.iter().find(|(tuple, _)| !kernel.contains_key(*tuple));
    ensure!(missing.is_none(), "only the library has {missing:?}");
    Ok(())
}

const PACKETS: usize = 10_000;
/// So many packets between two looks at the connection tables.
const BATCH: usize = 250;

fn kernel_and_library_agree_on_noise(sandbox: &Sandbox) -> Result<()> {
    let mut fake = world();
    let (changed, drops) = agree(sandbox, &mut fake)?;
    ensure!(changed > PACKETS / 4, "{changed} of {PACKETS} packets were changed");
    ensure!(drops.len() >= 5, "few reasons to drop: {drops:?}");
    let moved =
        |(tuple, entry): (&Wide, &Entry)| entry.kind == Entry::FORWARD && entry.src_port != tuple.src_port;
    let moved = fake.tracked().iter().filter(|row| moved(*row)).count();
    ensure!(moved > 0, "no flow got another source port");
    Ok(())
}

fn kernel_and_library_agree_on_policies(sandbox: &Sandbox) -> Result<()> {
    let mut fake = guarded_world();
    let (_changed, drops) = agree(sandbox, &mut fake)?;
    for reason in [
        DropReason::PolicyIngress,
        DropReason::PolicyEgress,
        DropReason::DryRunIngress,
        DropReason::DryRunEgress,
    ] {
        let count = drops.iter().find(|(it, _)| *it == reason).map_or(0, |(_, count)| *count);
        ensure!(count > 0, "none is counted as {}: {drops:?}", reason.as_str());
        let told = fake.would_drop.borrow().iter().filter(|it| **it == reason).count() as u64;
        ensure!(!reason.is_dry_run() || told == count, "{}: {told} in the library, {count}", reason.as_str());
    }
    let plain = fake.tracked().values().filter(|entry| entry.flags & Entry::PLAIN != 0).count();
    ensure!(plain > 0, "no flow of no service is tracked");
    Ok(())
}

/// Random packets through both, over the same tables: how many were changed, and the packets dropped by reason.
fn agree(sandbox: &Sandbox, fake: &mut Fake) -> Result<(usize, Vec<(DropReason, u64)>)> {
    let mut programs = Programs::load(&sandbox.place()?, DEFAULTS)?;
    let mut noise = Noise(0xf10e);
    programs.fill(fake)?;
    let mut changed = 0;
    for packet in 0..PACKETS {
        let program = if noise.percent(75) { Program::PodEgress } else { Program::PodIngress };
        let bytes = noise.packet();
        fake.clock.set(Programs::now()?);
        let kernel = programs.run(program, &bytes)?;
        fake.dice.set(thrown(&kernel.1));
        let (verdict, host) = program.on_host(&bytes, fake);
        changed += usize::from(host != bytes);
        same("kernel", &kernel, &(verdict.into(), host))
            .with_context(|| format!("packet {packet}, {verdict:?}, {}: {}", program.name(), hex(&bytes)))?;
        if packet % BATCH == BATCH - 1 {
            compare_tracked(&programs, fake).with_context(|| format!("after packet {packet}"))?;
            age(&mut programs, fake, &mut noise)?;
        }
    }
    Ok((changed, programs.drops()?))
}

/// Brings some flows nearer their end or beyond it, and retires a backend, in both worlds.
fn age(programs: &mut Programs, fake: &mut Fake, noise: &mut Noise) -> Result<()> {
    const MARGIN: u32 = 5;
    let now = Programs::now()?;
    for row in fake.conntrack.borrow().values() {
        let entry = row.entry.get();
        let seconds = noise.pick(&[0, 0, 10, 40, 3_000, 90_000]);
        let expires = entry.expires.saturating_sub(seconds);
        // None is left to end during the next packets.
        let expires = if expires.abs_diff(now) < MARGIN { now - MARGIN } else { expires };
        row.entry.set(Entry { expires, ..entry });
    }
    let index = 1 + noise.below(fake.backends.len() - 1);
    fake.backends[index].generation += 1;
    programs.fill(fake)?;
    programs.set_tracked(&fake.tracked())
}

fn every_program_loads_with_every_constant(sandbox: &Sandbox) -> Result<()> {
    for constants in Constants::ALL {
        let mut programs =
            Programs::load(&sandbox.place()?, constants).with_context(|| format!("{constants:?}"))?;
        let mut names = Vec::new();
        for (name, program) in programs.datapath.programs().programs() {
            program.fd().with_context(|| format!("{name} is not loaded"))?;
            names.push(name.to_owned());
        }
        names.sort();
        ensure!(names == PROGRAMS, "{names:?}");
    }
    Ok(())
}

const PROGRAMS: [&str; 15] = [
    "connect4",
    "connect6",
    "device_egress",
    "device_ingress",
    "device_xdp",
    "getpeername4",
    "getpeername6",
    "pod_egress",
    "pod_ingress",
    "recvmsg4",
    "recvmsg6",
    "sendmsg4",
    "sendmsg6",
    "tunnel_egress",
    "tunnel_ingress",
];

/// The names of the fields are part of the interface: who debugs has bpftool.
fn bpftool_shows_the_tables_by_name(sandbox: &Sandbox) -> Result<()> {
    if Command::new("bpftool").arg("version").output().is_err() {
        return runner::skip("bpftool_shows_the_tables_by_name", "needs bpftool");
    }
    let mut programs = Programs::load(&sandbox.place()?, DEFAULTS)?;
    let mut fake = Fake::default();
    let vip = (Addr::v4([10, 96, 0, 10]), 80);
    fake.service(vip.0, vip.1, ferroflow_common::addr::Proto::TCP, &[(Addr::v4([10, 244, 1, 2]), 8080)]);
    programs.fill(&fake)?;
    let rows = shown(&programs, "frontends", &["dump"])?;
    ensure!(rows.as_array().is_some_and(|rows| rows.len() == 1), "{rows}");
    let row = &rows[0]["formatted"];
    ensure!(row["key"]["addr"]["bytes"].is_array(), "{row}");
    ensure!(row["key"]["proto"]["number"] == 6, "{row}");
    ensure!(row["key"]["port"]["be"] == serde_json::json!([0, 80]), "{row}");
    for (field, value) in [("service", 1), ("offset", 0), ("length", 1), ("flags", 1), ("affinity", 0)] {
        ensure!(row["value"][field] == value, "{field}: {row}");
    }
    // A dump shows each of many thousand rows like this one.
    let row = shown(&programs, "backends", &["lookup", "key", "1", "0", "0", "0"])?;
    let row = &row["formatted"]["value"];
    ensure!(row["port"]["be"] == serde_json::json!([31, 144]), "{row}");
    for (field, value) in [("flags", 1), ("generation", 1), ("service", 1)] {
        ensure!(row[field] == value, "{field}: {row}");
    }
    Ok(())
}

/// What `bpftool map` says of a table.
fn shown(programs: &Programs, map: &str, verb: &[&str]) -> Result<Value> {
    let (verb, rest) = verb.split_first().context("no verb")?;
    let output = Command::new("bpftool")
        .args(["--json", "map", verb, "pinned"])
        .arg(programs.pin(map))
        .args(rest)
        .output()
        .context("bpftool")?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(serde_json::from_slice(&output.stdout)?)
}
