//! How many tables a packet asks on each of its ways, which is most of what it costs: hash tables (and tries), and
//! arrays, which are nearly free. Counted in the library over tables in memory, the same for both families.
//!
//! A change of these numbers is a change of what every packet costs: it is made here, on purpose, or not at all.
#![forbid(unsafe_code)]

use std::fmt::Write as _;

use ferroflow_common::abi::lb::{Frontend, FrontendKey};
use ferroflow_common::abi::node::NodeAddress;
use ferroflow_common::addr::Proto;
use ferroflow_common::family::{V4, V6};
use ferroflow_common::tcp::Flags;
use ferroflow_ebpf::frame::{Frame, Names, Socket};
use ferroflow_ebpf::tables::fake::{Fake, Lookups};

/// The way, hash tables, arrays.
const COSTS: &str = "\
what                                          hash  array
pod to local pod                                 3      2
pod to remote pod                                4      2
known flow to a local backend                    2      1
known flow to a remote backend                   3      1
known flow, answer of a local backend            2      1
known flow, answer from another node             2      1
new flow to a local backend                      8      8
new flow, affinity                              10      9
new flow that keeps its backend                 10      8
no endpoints                                     3      0
new flow of a NodePort, masqueraded             18      8
known flow of a NodePort                         2      1
from outside, for no service                     6      1
from the stack to a pod                          1      0
";

#[test]
fn ways_cost_what_the_table_says() {
    for table in [table::<V4>(), table::<V6>()] {
        assert_eq!(table, COSTS, "\n{table}");
    }
}

struct Net {
    fake: Fake,
    client: Socket,
    local: Socket,
    remote: Socket,
    near: Socket,
    far: Socket,
    kept: Socket,
    none: Socket,
    outside: Socket,
    node_port: Socket,
}

impl Net {
    fn new<F: Names>() -> Self {
        let mut fake = Fake::default();
        let (local, remote) = ((F::pod(2), 8080), (F::pod(3), 8080));
        let node = F::vip(200);
        fake.service(F::vip(1), 80, Proto::TCP, &[local]);
        fake.service(F::vip(2), 80, Proto::TCP, &[remote]);
        fake.service(F::vip(3), 80, Proto::TCP, &[local]).affinity = 100;
        fake.service(F::vip(9), 80, Proto::TCP, &[]);
        let any = if node.is_v4() { FrontendKey::NODE_V4 } else { FrontendKey::NODE_V6 };
        fake.service(any, 30_080, Proto::TCP, &[remote]).flags = Frontend::NORTH_SOUTH;
        fake.node.insert(node, NodeAddress { flags: NodeAddress::NODE_PORTS });
        fake.local(F::pod(1), 11);
        fake.local(F::pod(2), 12);
        fake.elsewhere.push(F::pod(3));
        for backend in &mut fake.backends {
            backend.flags |= ferroflow_common::abi::lb::Backend::CLUSTER;
        }
        Self {
            fake,
            client: (F::pod(1), 4000),
            local,
            remote,
            near: (F::vip(1), 80),
            far: (F::vip(2), 80),
            kept: (F::vip(3), 80),
            none: (F::vip(9), 80),
            outside: (F::vip(99), 4000),
            node_port: (node, 30_080),
        }
    }

    /// What this costs; whether it is served is for other tests.
    fn cost(&self, does: impl FnOnce(&Fake)) -> Lookups {
        self.fake.lookups.set(Lookups::default());
        does(&self.fake);
        self.fake.lookups.get()
    }

    fn leave(&self, src: Socket, dst: Socket, flags: u8) -> Lookups {
        self.cost(|fake| _ = Frame::tcp(src, dst, flags).leave(fake))
    }

    fn arrive(&self, src: Socket, dst: Socket, flags: u8) -> Lookups {
        self.cost(|fake| _ = Frame::tcp(src, dst, flags).arrive(fake))
    }
}

fn table<F: Names>() -> String {
    const SYN: u8 = Flags::SYN;
    const ACK: u8 = Flags::ACK;
    let net = Net::new::<F>();
    let mut ways = vec![
        ("pod to local pod", net.leave(net.client, (net.local.0, 9), ACK)),
        ("pod to remote pod", net.leave(net.client, (net.remote.0, 9), ACK)),
    ];
    let opened = net.leave(net.client, net.near, SYN);
    net.leave(net.client, net.far, SYN);
    // Both directions have been seen, so nothing is written any more.
    for _ in 0..2 {
        net.leave(net.local, net.client, SYN | ACK);
        net.arrive(net.remote, net.client, SYN | ACK);
    }
    ways.extend([
        ("known flow to a local backend", net.leave(net.client, net.near, ACK)),
        ("known flow to a remote backend", net.leave(net.client, net.far, ACK)),
        ("known flow, answer of a local backend", net.leave(net.local, net.client, ACK)),
        ("known flow, answer from another node", net.arrive(net.remote, net.client, ACK)),
        ("new flow to a local backend", opened),
        ("new flow, affinity", net.leave((net.client.0, 4001), net.kept, SYN)),
        ("new flow that keeps its backend", net.leave((net.client.0, 4002), net.kept, SYN)),
        ("no endpoints", net.leave(net.client, net.none, SYN)),
        ("new flow of a NodePort, masqueraded", net.arrive(net.outside, net.node_port, SYN)),
        ("known flow of a NodePort", net.arrive(net.outside, net.node_port, ACK)),
        ("from outside, for no service", net.arrive(net.outside, (net.local.0, 9), SYN)),
        (
            "from the stack to a pod",
            net.cost(|fake| {
                _ = Frame::tcp(net.outside, (net.local.0, 9), SYN).enter(fake);
            }),
        ),
    ]);
    let mut table = format!("{:44} {:>5} {:>6}\n", "what", "hash", "array");
    for (what, Lookups { hash, array }) in ways {
        let _infallible = writeln!(table, "{what:44} {hash:>5} {array:>6}");
    }
    table
}
