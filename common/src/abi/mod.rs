//! The layout of every map's key and value.
//!
//! Rules: `repr(C)`, no implicit padding (zerocopy's `IntoBytes` refuses it at compile time, and the verifier would
//! refuse a key with it), every bit pattern valid (`FromBytes`), wire types for addresses and ports. The names of
//! the fields are what `bpftool map dump` prints: they are part of the interface.
//!
//! Another version finds the maps of this one and takes their rows over: keys stay as they are, new fields of a value
//! stand at its end, and zero in them means what was meant before there were any.

pub mod conntrack;
pub mod endpoint;
pub mod fragment;
pub mod lb;
pub mod node;
pub mod policy;
pub mod relay;
pub mod socket;
pub mod state;
pub mod tunnel;

use core::mem::size_of;

const _: () = {
    assert!(size_of::<lb::FrontendKey>() == 20);
    assert!(size_of::<lb::Frontend>() == 20);
    assert!(size_of::<lb::Backend>() == 32);
    assert!(size_of::<lb::SourceRangeKey>() == 24);
    assert!(size_of::<lb::AffinityKey>() == 20);
    assert!(size_of::<lb::Affinity>() == 12);
    assert!(size_of::<conntrack::Tuple<[u8; 4]>>() == 16);
    assert!(size_of::<conntrack::Tuple<[u8; 16]>>() == 40);
    assert!(size_of::<conntrack::Entry>() == 56);
    assert!(size_of::<fragment::DatagramKey>() == 40);
    assert!(size_of::<fragment::Datagram>() == 40);
    assert!(size_of::<socket::Translation>() == 44);
    assert!(size_of::<socket::Translations>() == 180);
    assert!(socket::Translations::ROWS.is_power_of_two());
    assert!(size_of::<tunnel::Tunnel>() == 28);
    assert!(size_of::<endpoint::Endpoint>() == 20);
    assert!(size_of::<policy::RangeKey>() == 20);
    assert!(size_of::<policy::PolicyKey>() == 8);
    assert!(size_of::<policy::Rules>() == 12);
    assert!(size_of::<policy::PortRange>() == 8);
    assert!(size_of::<policy::Meaning>() == 256);
};
