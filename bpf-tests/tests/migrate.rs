//! Pinned maps of another size or another version: their rows are taken over, or nothing is changed.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use anyhow::{Context as _, Result, bail, ensure};
use aya::maps::{HashMap, Map, MapData};
use bpf_tests::{
    run::{object, options},
    runner,
    sandbox::Sandbox,
};
use ferroflow::{
    config::{Bpffs, Xdp},
    datapath::{Datapath, Options},
    maps::{Backends, Maps as _, Slots, kernel::KernelMaps},
};
use ferroflow_common::abi::lb::Backend;

fn main() -> ExitCode {
    runner::main(&[
        ("rows_of_shorter_values_are_taken_over", rows_of_shorter_values_are_taken_over),
        ("rows_of_arrays_keep_their_indices", rows_of_arrays_keep_their_indices),
        ("what_does_not_fit_is_refused_and_stays", what_does_not_fit_is_refused_and_stays),
        ("what_was_left_half_done_is_begun_anew", what_was_left_half_done_is_begun_anew),
    ])
}

const LRU_HASH: u32 = 9;
const ROWS: u32 = 9_000;

/// A connection table as an older version may have laid it out: the last word of a value was not there yet.
fn rows_of_shorter_values_are_taken_over(sandbox: &Sandbox) -> Result<()> {
    let bpffs = Bpffs { dir: sandbox.place()?.bpffs };
    std::fs::create_dir_all(bpffs.maps())?;
    let pin = bpffs.maps().join("conntrack_v4");
    let older = aya_obj::Map::new_from_params(LRU_HASH, 16, 48, 65_536, 0);
    let older = MapData::create(older, "conntrack_v4", None)?;
    older.pin(&pin)?;
    let mut older = HashMap::<_, [u8; 16], [u8; 48]>::try_from(Map::LruHashMap(older))?;
    for number in 0..ROWS {
        older.insert(&key(number), &[number as u8; 48], 0)?;
    }
    let mut datapath = Datapath::load(&object()?, options(&bpffs.dir, Xdp::Off))?;
    let newer = HashMap::<_, [u8; 16], [u8; 56]>::try_from(Map::LruHashMap(MapData::from_pin(&pin)?))?;
    for number in 0..ROWS {
        let row = newer.get(&key(number), 0).with_context(|| format!("row {number}"))?;
        ensure!(row[..48] == [number as u8; 48] && row[48..] == [0; 8], "row {number}: {row:?}");
    }
    // What the programs of before note until they are swapped comes too, and what there is newer stays.
    older.insert(&key(ROWS), &[7; 48], 0)?;
    older.insert(&key(1), &[9; 48], 0)?;
    let found = datapath.patrol(std::iter::empty());
    ensure!(found.failed.is_empty(), "{found:?}");
    let row = newer.get(&key(ROWS), 0).context("a row that came late")?;
    ensure!(row[..48] == [7; 48], "{row:?}");
    ensure!(newer.get(&key(1), 0)?[..48] == [1; 48], "a row was overwritten");
    Ok(())
}

fn key(number: u32) -> [u8; 16] {
    let mut key = [0; 16];
    key[..4].copy_from_slice(&number.to_be_bytes());
    key
}

fn rows_of_arrays_keep_their_indices(sandbox: &Sandbox) -> Result<()> {
    let bpffs = Bpffs { dir: sandbox.place()?.bpffs };
    // Beyond the first window of each.
    let (index, slot) = (8_200, 30_000);
    drop(Datapath::load(&object()?, sized(&bpffs, 16_384))?);
    write(&bpffs, index, slot)?;
    for room in [65_536, 8_201, 131_072] {
        drop(Datapath::load(&object()?, sized(&bpffs, room))?);
        let maps = KernelMaps::open(&bpffs.maps())?;
        ensure!(maps.len::<Backends>() == room && maps.len::<Slots>() == 4 * room, "room for {room}");
        ensure!(maps.read::<Backends>(index)?.generation == 5, "backend {index} with room for {room}");
        ensure!(maps.read::<Slots>(slot)? == index, "slot {slot} with room for {room}");
    }
    Ok(())
}

fn what_does_not_fit_is_refused_and_stays(sandbox: &Sandbox) -> Result<()> {
    let bpffs = Bpffs { dir: sandbox.place()?.bpffs };
    drop(Datapath::load(&object()?, sized(&bpffs, 16_384))?);
    write(&bpffs, 8_200, 30_000)?;
    let Err(error) = Datapath::load(&object()?, sized(&bpffs, 8_000)) else {
        bail!("row 8200 fits into 8000")
    };
    let text = error.to_string();
    ensure!(text.contains("map `backends`") && text.contains("the sizes it had"), "{text}");
    let maps = KernelMaps::open(&bpffs.maps())?;
    ensure!(maps.len::<Backends>() == 16_384 && maps.read::<Backends>(8_200)?.generation == 5, "it is lost");
    ensure!(!bpffs.dir.join("next").exists(), "a leftover");
    Ok(())
}

fn what_was_left_half_done_is_begun_anew(sandbox: &Sandbox) -> Result<()> {
    let bpffs = Bpffs { dir: sandbox.place()?.bpffs };
    drop(Datapath::load(&object()?, sized(&bpffs, 16_384))?);
    write(&bpffs, 8_200, 30_000)?;
    let half = MapData::create(aya_obj::Map::new_from_params(LRU_HASH, 16, 48, 64, 0), "half", None)?;
    std::fs::create_dir(bpffs.dir.join("next"))?;
    half.pin(bpffs.dir.join("next/backends"))?;
    drop(Datapath::load(&object()?, sized(&bpffs, 32_768))?);
    let maps = KernelMaps::open(&bpffs.maps())?;
    ensure!(maps.read::<Backends>(8_200)?.generation == 5, "it is lost");
    ensure!(!bpffs.dir.join("next").exists(), "a leftover");
    Ok(())
}

fn sized(bpffs: &Bpffs, max_endpoints: u32) -> Options {
    Options { max_endpoints, ..options(&bpffs.dir, Xdp::Off) }
}

fn write(bpffs: &Bpffs, index: u32, slot: u32) -> Result<()> {
    let mut maps = KernelMaps::open(&bpffs.maps())?;
    let row = Backend { flags: Backend::LIVE, generation: 5, ..maps.read::<Backends>(index)? };
    maps.write::<Backends>(index, &row)?;
    Ok(maps.write::<Slots>(slot, &index)?)
}
