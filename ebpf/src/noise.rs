//! Random packets for tests, from a seed: most of them meant for the services of [`world`], some damaged.

use ferroflow_common::abi::node::Settings;
use ferroflow_common::abi::policy::{EndpointPolicy, PolicyKey, PortRange, RangeKey, Verdict};
use ferroflow_common::addr::{Addr, Proto};
use ferroflow_common::family::{V4, V6};
use ferroflow_common::tcp::Flags;

use crate::frame::{
    AUTHENTICATION, DESTINATION_OPTIONS, Frame, HOP_BY_HOP, Names, Part, ROUTING, Socket, Transport,
    UdpChecksum,
};
use crate::packet::L3;
use crate::tables::fake::Fake;

/// A small generator (splitmix64), so that a failure repeats.
#[derive(Clone, Copy, Debug)]
pub struct Noise(pub u64);

impl Noise {
    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// At least 0, less than `end`.
    pub fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.number() % end.max(1) as u64).unwrap_or(0)
    }

    /// True in so many of a hundred.
    pub fn percent(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }

    pub fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len())]
    }

    pub fn bytes(&mut self, length: usize) -> Vec<u8> {
        (0..length).map(|_| self.number() as u8).collect()
    }

    /// A packet of the world, seldom damaged, seldom anything at all.
    pub fn packet(&mut self) -> Vec<u8> {
        if self.percent(3) {
            let length = SHORTEST + self.below(120);
            let mut bytes = self.bytes(length);
            let kind = self.pick(&[[8, 0], [0x86, 0xdd], [8, 6], [0x81, 0]]);
            bytes[12..14].copy_from_slice(&kind);
            return bytes;
        }
        let frame = if self.percent(50) { self.frame::<V4>() } else { self.frame::<V6>() };
        let mut bytes = frame.build();
        bytes.resize(bytes.len().max(SHORTEST), 0);
        if self.percent(12) {
            self.damage(&mut bytes);
        }
        bytes
    }

    /// A packet of the world with right checksums; seldom an ICMP error about one.
    pub fn frame<F: Names>(&mut self) -> Frame {
        if self.percent(6) { self.error::<F>() } else { self.segment::<F>() }
    }

    /// An error about what answers a packet of the world, as most of those are about that were rewritten.
    fn error<F: Names>(&mut self) -> Frame {
        let answered = self.segment::<F>();
        let about = answered
            .clone()
            .sent_from((answered.dst, answered.dst_port))
            .sent_to((answered.src, answered.src_port));
        let from = if self.percent(50) { about.dst } else { F::vip(200) };
        let (kind, code) = if self.percent(90) {
            let v4 = F::CSUM_OFF.is_some();
            if v4 {
                self.pick(&[(3, 3), (3, 4), (11, 0), (12, 0)])
            } else {
                self.pick(&[(1, 4), (2, 0), (3, 0), (4, 0)])
            }
        } else {
            (self.number() as u8, 0)
        };
        let bytes = about.build();
        let quoted =
            if self.percent(50) { bytes.len() } else { ETHERNET + self.below(bytes.len() - ETHERNET) };
        let mut error = Frame::icmp(from, about.src, kind, code).payload(&bytes[ETHERNET..quoted]);
        if self.percent(10) {
            error = error.extended();
        }
        error
    }

    fn segment<F: Names>(&mut self) -> Frame {
        let (proto, service, target) = self.pick(&SERVICES);
        let (src, dst) = self.ends::<F>(service, target);
        let mut frame = match proto {
            Proto::TCP => Frame::tcp(src, dst, self.flags()),
            Proto::SCTP => {
                let chunk = self.below(16) as u8;
                Frame::sctp(src, dst, chunk)
            }
            Proto { .. } => Frame::udp(src, dst),
        };
        if let Transport::Tcp { seq, ack, options, .. } = &mut frame.transport {
            (*seq, *ack) = (self.number() as u32, self.number() as u32);
            *options = vec![1; self.below(4) * 4];
        }
        if proto == Proto::UDP && self.percent(15) {
            frame.transport = Transport::Udp { checksum: UdpChecksum::None };
        }
        if self.percent(4) {
            frame.transport =
                Transport::Other(self.pick(&[Proto { number: 59 }, Proto::ICMPV6, Proto::ICMP]));
        }
        let length = self.below(60);
        frame.payload = self.bytes(length);
        if self.percent(20) {
            frame.options = vec![1; (1 + self.below(10)) * 4];
            let kinds = [HOP_BY_HOP, DESTINATION_OPTIONS, ROUTING, AUTHENTICATION];
            let count = 1 + self.below(7);
            frame.extensions = (0..count).map(|_| (self.pick(&kinds), 1 + self.below(3) as u8)).collect();
        }
        // Whether an SCTP fragment is dropped depends on the port that its flow gets, which nobody sees then.
        if proto != Proto::SCTP && self.percent(8) {
            frame.fragment =
                Some(self.pick(&[Part::First, Part::Middle(8), Part::Later(64), Part::Later(1480)]));
            frame.id = self.below(4) as u16;
        }
        frame
    }

    fn ends<F: Names>(&mut self, service: u16, target: u16) -> (Socket, Socket) {
        let client = (F::pod(self.pick(&[1, 2, 4])), self.pick(&[4000, 4001, 4002]));
        let vip = (F::vip(self.pick(&[1, 1, 1, 2, 2, 3, 8, 9])), service);
        let backend = (F::pod(self.pick(&[2, 3])), target);
        match self.below(10) {
            0..5 => (client, vip),
            5..8 => (backend, client),
            // What a pod that is its own backend answers.
            8 => ((F::pod(2), target), (vip.0, client.1)),
            _ => {
                let anyone: [Socket; 5] = [client, vip, backend, (F::pod(77), 9), (F::vip(1), 443)];
                (self.pick(&anyone), self.pick(&anyone))
            }
        }
    }

    fn flags(&mut self) -> u8 {
        let fin = Flags::FIN | Flags::ACK;
        let ack = Flags::ACK;
        self.pick(&[
            Flags::SYN,
            Flags::SYN,
            Flags::SYN | ack,
            ack,
            ack,
            ack | 8,
            fin,
            Flags::RST,
            Flags::RST | ack,
            Flags::SYN | Flags::FIN,
            0,
        ])
    }

    fn damage(&mut self, bytes: &mut Vec<u8>) {
        match self.below(4) {
            0 => bytes.truncate(SHORTEST + self.below(bytes.len() - SHORTEST + 1)),
            1 => {
                let padding = 1 + self.below(20);
                bytes.extend(self.bytes(padding));
            }
            _ => {
                // The headers are where a change matters.
                let at = 14 + self.below(bytes.len().min(90) - 14);
                bytes[at] = self.number() as u8;
            }
        }
    }
}

const ETHERNET: usize = L3 as usize;

/// The kernel runs programs on no shorter IPv6 packet, and every packet here has this length.
const SHORTEST: usize = 54;

/// Services of both families, with what may go wrong between them: two frontends of one backend, a pod that is its own
/// backend, one frontend that refuses and one that drops. Pods 1 and 2 are local.
pub fn world() -> Fake {
    let mut fake = Fake::default();
    services::<V4>(&mut fake);
    services::<V6>(&mut fake);
    fake
}

/// The same, with policies: pod 1 is isolated both ways, pod 2 as to what comes in, in part by a policy in dry run.
pub fn guarded_world() -> Fake {
    let mut fake = world();
    fake.settings = Some(Settings { flags: Settings::POLICIES, ..Settings::NONE });
    guard::<V4>(&mut fake);
    guard::<V6>(&mut fake);
    let range =
        |proto, first, last, verdict| PortRange { first, last, proto, verdict: verdict as u8, cause: 0 };
    let policies = &mut fake.policies;
    policies.lay(5, PolicyKey::OTHERS, Verdict::Deny, &[range(Proto::TCP, 80, 8080, Verdict::Allow)]);
    policies.lay(5, 2, Verdict::Allow, &[range(Proto::UDP, 53, 53, Verdict::Deny)]);
    let ports = [
        range(Proto::TCP, 0, 4000, Verdict::Allow),
        range(Proto::TCP, 8080, 8080, Verdict::WouldDeny),
        range(Proto::UDP, 53, 5353, Verdict::Allow),
        range(Proto::SCTP, 3868, 3868, Verdict::Allow),
    ];
    policies.lay(6, PolicyKey::OTHERS, Verdict::Deny, &ports);
    policies.lay(7, PolicyKey::OTHERS, Verdict::WouldDeny, &ports[..1]);
    policies.lay(7, 1, Verdict::Deny, &ports[1..3]);
    fake
}

fn guard<F: Names>(fake: &mut Fake) {
    for (pod, ingress, egress) in [(1, 5, 6), (2, 7, EndpointPolicy::OPEN)] {
        if let Some(row) = fake.endpoints.get_mut(&F::pod(pod)) {
            row.policy = EndpointPolicy { ingress, egress, adopts_until: 0, live: EndpointPolicy::FINISH };
        }
        fake.policies.classes.insert(F::pod(pod), pod.into());
    }
    let bits = if F::CSUM_OFF.is_some() { 96 + 24 } else { 112 };
    fake.policies.ranges.insert(RangeKey { bits, addr: F::pod(0) }, 3);
}

/// The ports of a service, and where its backends listen.
const SERVICES: [(Proto, u16, u16); 3] =
    [(Proto::TCP, 80, 8080), (Proto::UDP, 53, 5353), (Proto::SCTP, 38412, 3868)];

fn services<F: Names>(fake: &mut Fake) {
    for (proto, port, target) in SERVICES {
        let backends: [(Addr, u16); 2] = [(F::pod(2), target), (F::pod(3), target)];
        fake.service(F::vip(1), port, proto, &backends);
        fake.service(F::vip(2), port, proto, &backends[..1]);
        fake.service(F::vip(3), port, proto, &backends[1..]);
        fake.service(F::vip(8), port, proto, &[]).flags = 0;
        fake.service(F::vip(9), port, proto, &[]);
    }
    fake.local(F::pod(1), 11);
    fake.local(F::pod(2), 12);
}
