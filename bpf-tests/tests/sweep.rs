//! The sweep of flows that are idle, or by addresses that are gone, on a real table.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use anyhow::{Result, ensure};
use aya::maps::{HashMap, Map, MapData};
use bpf_tests::{
    run::{object, options},
    runner,
    sandbox::Sandbox,
};
use ferroflow::{
    clock,
    config::{Bpffs, Xdp},
    datapath::Datapath,
    gc,
    maps::{
        Backends, ConnectionCounts, Maps as _, NodeAddresses,
        kernel::{KernelMaps, Sweep},
    },
};
use ferroflow_common::{
    abi::{
        conntrack::{Entry, Tuple},
        lb::Backend,
        node::NodeAddress,
    },
    addr::{Addr, Port, Proto},
};
use zerocopy::IntoBytes as _;

fn main() -> ExitCode {
    runner::main(&[
        ("a_sweep_deletes_what_expired_and_nothing_else", a_sweep_deletes_what_expired),
        ("a_sweep_ends_flows_by_an_address_that_is_gone_for_good", a_sweep_ends_flows),
    ])
}

/// More than one step of a dump, and not a multiple of it.
const FLOWS: u32 = 10_001;

fn a_sweep_deletes_what_expired(sandbox: &Sandbox) -> Result<()> {
    let bpffs = Bpffs { dir: sandbox.place()?.bpffs };
    let _programs = Datapath::load(&object()?, options(&bpffs.dir, Xdp::Off))?;
    let now = clock::seconds();
    let table = Map::LruHashMap(MapData::from_pin(bpffs.maps().join("conntrack_v4"))?);
    let mut table = HashMap::<_, [u8; 16], [u8; 56]>::try_from(table)?;
    for number in 0..FLOWS {
        let (tuple, entry) = flow(number, if number % 3 == 0 { now - 5 } else { now + 600 });
        let (key, value) = (tuple.as_bytes().try_into()?, entry.as_bytes().try_into()?);
        table.insert(&key, &value, 0)?;
    }
    let mut maps = KernelMaps::open(&bpffs.maps())?;
    // What the programs counted of a backend that serves, and of two that do not: one is another by now.
    let backend = Backend { flags: Backend::LIVE, generation: 1, ..maps.read::<Backends>(1)? };
    maps.write::<Backends>(1, &backend)?;
    maps.write::<Backends>(2, &Backend { generation: 2, ..backend })?;
    for (index, counted) in [(1, 3), (2, 70_000), (3, 8)] {
        maps.write::<ConnectionCounts>(index, &counted)?;
    }
    let expired = u64::from(FLOWS.div_ceil(3));
    let mut lost = gc::Lost::new();
    let [first, other] = gc::sweep(&mut maps, &mut lost)?;
    ensure!(other == Sweep::default(), "IPv6: {other:?}");
    ensure!(first == Sweep { seen: FLOWS.into(), deleted: expired, ended: 0 }, "{first:?}");
    let counts = [1, 2, 3].map(|index| maps.read::<ConnectionCounts>(index).ok());
    // Of three in a row one expired, of the other two one is a backend's of another generation.
    let open = u64::from((0..FLOWS).filter(|number| number % 3 == 1).count() as u32);
    ensure!(counts == [Some(open), Some(0), Some(0)], "{counts:?}, not {open}");
    let [second, _] = gc::sweep(&mut maps, &mut lost)?;
    ensure!(second == Sweep { seen: u64::from(FLOWS) - expired, deleted: 0, ended: 0 }, "{second:?}");
    let left = maps.conntrack::<[u8; 4]>()?;
    ensure!(left.len() as u64 == u64::from(FLOWS) - expired, "{} are left", left.len());
    ensure!(left.iter().all(|(_, entry)| entry.expires > now), "an expired flow is left");
    Ok(())
}

/// Gone at two sweeps in a row, that is.
fn a_sweep_ends_flows(sandbox: &Sandbox) -> Result<()> {
    let bpffs = Bpffs { dir: sandbox.place()?.bpffs };
    let _programs = Datapath::load(&object()?, options(&bpffs.dir, Xdp::Off))?;
    let expires = clock::seconds() + 600;
    let table = Map::LruHashMap(MapData::from_pin(bpffs.maps().join("conntrack_v4"))?);
    let mut table = HashMap::<_, [u8; 16], [u8; 56]>::try_from(table)?;
    // One flow as its client's own, and one by each of two addresses.
    let (stays, goes) = (Addr::v4([192, 168, 50, 1]), Addr::v4([192, 168, 50, 2]));
    for (number, known) in [None, Some(stays), Some(goes)].into_iter().enumerate() {
        for (tuple, entry) in both(flow(number as u32, expires), known) {
            table.insert(&tuple.as_bytes().try_into()?, &entry.as_bytes().try_into()?, 0)?;
        }
    }
    let mut maps = KernelMaps::open(&bpffs.maps())?;
    let own = NodeAddress { flags: 0 };
    maps.put::<NodeAddresses>(&stays, &own)?;
    let mut lost = gc::Lost::new();
    let mut ended = |maps: &mut KernelMaps| gc::sweep(maps, &mut lost).map(|[v4, _]| (v4.seen, v4.ended));
    ensure!(ended(&mut maps)? == (6, 0), "at the first sweep");
    maps.put::<NodeAddresses>(&goes, &own)?;
    ensure!(ended(&mut maps)? == (6, 0), "it came back");
    maps.delete::<NodeAddresses>(&goes)?;
    ensure!(ended(&mut maps)? == (6, 0), "it went again");
    ensure!(ended(&mut maps)? == (6, 2), "gone twice");
    let left = maps.conntrack::<[u8; 4]>()?;
    ensure!(left.len() == 4, "{left:?}");
    ensure!(left.iter().all(|(tuple, entry)| entry.src != goes && Addr::v4(tuple.dst) != goes), "{left:?}");
    Ok(())
}

/// Both directions of a flow, whose backend knows the client by this address.
fn both((tuple, entry): (Tuple<[u8; 4]>, Entry), known: Option<Addr>) -> [(Tuple<[u8; 4]>, Entry); 2] {
    let known = known.unwrap_or(Addr::v4(tuple.src));
    let back = Tuple {
        src: entry.dst.v4_bytes(),
        dst: known.v4_bytes(),
        src_port: entry.dst_port,
        dst_port: entry.src_port,
        ..tuple
    };
    let reply = Entry {
        src: Addr::v4(tuple.dst),
        dst: Addr::v4(tuple.src),
        src_port: tuple.dst_port,
        dst_port: tuple.src_port,
        kind: Entry::REPLY,
        ..entry
    };
    [(tuple, Entry { src: known, ..entry }), (back, reply)]
}

fn flow(number: u32, expires: u32) -> (Tuple<[u8; 4]>, Entry) {
    let [_, high, mid, low] = number.to_be_bytes();
    let tuple = Tuple {
        src: [10, high, mid, low],
        dst: [10, 96, 0, 10],
        src_port: Port::new(40_000),
        dst_port: Port::new(53),
        proto: Proto::UDP,
        reserved: [0; 3],
    };
    let entry = Entry {
        src: Addr::v4([10, high, mid, low]),
        dst: Addr::v4([10, 244, 1, 2]),
        src_port: Port::new(40_000),
        dst_port: Port::new(5353),
        kind: Entry::FORWARD,
        state: 0,
        flags: 0,
        reserved: 0,
        epoch: 0,
        backend: 1 + number % 3 / 2,
        generation: 1,
        expires,
    };
    (tuple, entry)
}
