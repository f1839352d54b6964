//! Sequences of calls as a C host may make them: any numbers, NULLs, texts, tensors and files, but
//! no pointer to memory that is not there.
//!
//! A call must fail with a status that its documentation lists, leave its words and touch nothing;
//! or succeed and write exactly what it was given to write.

#![no_main]

mod header;
mod memory;
mod views;

use std::{
    ffi::{CStr, c_char, c_void},
    fs,
    os::unix::ffi::OsStrExt,
    path::PathBuf,
    sync::LazyLock,
};

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
// Linked for its C functions alone.
use vmix as _;

use header::*;
use memory::{Block, Float, Floats, MAX_COUNT, Number, Rare, Small, StructSize};
use views::{Passed, Tensor};

/// More calls find nothing more, only later.
const MAX_CALLS: usize = 16;

/// Adapters, presets, and what a host meets less often: a known base, of which V_a is large, and a file
/// that no host uses.
const FILES: [&[u8]; 8] = [
    include_bytes!("../seeds/file/layernorm.safetensors"),
    include_bytes!("../seeds/file/linear.safetensors"),
    include_bytes!("../seeds/file/bare.safetensors"),
    include_bytes!("../seeds/file/preset.safetensors"),
    include_bytes!("../seeds/file/preset-f16.safetensors"),
    include_bytes!("../seeds/file/contrast.safetensors"),
    include_bytes!("../seeds/file/sd15.safetensors"),
    include_bytes!("../seeds/file/init.safetensors"),
];

/// How many of them are adapters and presets.
const ADAPTERS: u8 = 3;
const PRESETS: u8 = 3;

const TEXTS: [&[u8]; 8] = [
    b"vibrant color",
    b"sharp focus",
    b"de",
    b"down_blocks.0.attentions.0.transformer_blocks.0.attn2",
    b"output_blocks.0.1.transformer_blocks.0.attn2",
    b"modelspec.license",
    b"vmix.origin",
    b"",
];

/// A folder of these files, and one to write to.
static FOLDER: LazyLock<PathBuf> = LazyLock::new(|| {
    let folder = std::env::temp_dir().join(format!("vmix-fuzz-{}", std::process::id()));
    fs::create_dir_all(folder.join("saved")).expect("a temporary folder");
    for (i, file) in FILES.iter().enumerate() {
        fs::write(folder.join(i.to_string()), file).expect("a temporary file");
    }
    folder
});

#[derive(Debug, Arbitrary)]
enum Call {
    Library(u32),
    Open(Path, Rare<bool>),
    AdapterOpen(Path, Rare<()>),
    ValuesOpen(Path, Rare<()>),
    AdapterOpenMemory(File, Rare<()>),
    ValuesOpenMemory(File, Rare<()>),
    AdapterFree,
    ValuesFree,
    Info(Handle, Out),
    Metadata(Handle, Text, Rare<()>),
    Label(Handle, Index, Out),
    LabelFind(Handle, Text, Rare<()>),
    LabelDisplayName(Handle, Index, Text, Rare<()>),
    Layer(Handle, Index, Out),
    LayerFind(Handle, Text, Rare<()>),
    AesEmbed(Floats, Buffer),
    Project(Floats, Buffer),
    Values(
        Rare<()>,
        Floats,
        Enumeration,
        Enumeration,
        StructSize,
        u8,
        Rare<()>,
    ),
    Get(Index, Enumeration, Out),
    Copy(Index, Enumeration, Small<4>, Tensor),
    Save(Path),
    Mix(Mix),
    Attention(Box<Attention>),
}

/// Which kind of handle a call takes that there is for both.
#[derive(Debug, Clone, Copy, Arbitrary)]
enum Handle {
    Adapter,
    Values,
}

#[derive(Debug, Arbitrary)]
struct Index(u8, Rare<Number>);

#[derive(Debug, Arbitrary)]
struct Enumeration(u8, Rare<u32>);

#[derive(Debug, Arbitrary)]
struct Text(u8, Rare<Option<Vec<u8>>>);

#[derive(Debug, Arbitrary)]
struct Path(u8, Rare<PathChange>);

#[derive(Debug, Arbitrary)]
enum PathChange {
    Null,
    Empty,
    Absent,
    Folder,
    InNoFolder,
    Name(Vec<u8>),
}

#[derive(Debug, Arbitrary)]
struct File(u8, Rare<FileChange>);

#[derive(Debug, Arbitrary)]
enum FileChange {
    Null(Number),
    TooLong(Number),
    Byte(u16, u8),
    Cut(u16),
    Bytes(Vec<u8>),
}

/// A struct to be filled: NULL, or as long as the caller says.
#[derive(Debug, Arbitrary)]
struct Out(Rare<()>, StructSize);

/// A buffer to be filled: NULL, of the right size, of another, or of one that overflows.
#[derive(Debug, Arbitrary)]
struct Buffer(Rare<()>, Rare<Small<50>>, Rare<Number>);

#[derive(Debug, Arbitrary)]
struct Shape {
    batch: Small<3>,
    queries: Small<6>,
    tokens: Small<3>,
    chunks: Small<3>,
    heads: Small<3>,
    dim: Small<5>,
    // Enough for more than one block of queries.
    long: Rare<()>,
    aes_batch: bool,
    aes_heads: bool,
}

#[derive(Debug, Arbitrary)]
struct Mix {
    shape: Shape,
    value: Tensor,
    aes_value: Tensor,
    /// V_a lies in the values.
    inside: Rare<()>,
    strength: Strength,
    size: StructSize,
    more: u8,
    null: Rare<()>,
}

#[derive(Debug, Arbitrary)]
struct Strength {
    one: bool,
    values: Floats,
}

#[derive(Debug, Arbitrary)]
struct Attention {
    shape: Shape,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    aes_value: Option<Tensor>,
    strength: Strength,
    scale: Float,
    mask: Option<(Tensor, u8)>,
    query_mask: Option<(Tensor, u8)>,
    output: Tensor,
    /// The result replaces the query.
    in_place: Rare<()>,
    map: Option<(Tensor, Small<3>, Index)>,
    size: StructSize,
    more: u8,
    null: Rare<()>,
}

fuzz_target!(|input: (u8, Rare<()>, Rare<()>, Vec<Call>)| {
    let (file, no_adapter, no_values, calls) = input;
    let mut host = Host::new();
    // Most calls want handles.
    if !no_adapter.is_some() {
        let file = File(file % ADAPTERS, Rare(None));
        host.make(&Call::AdapterOpenMemory(file, Rare(None)));
    }
    if !no_values.is_some() {
        let file = File(ADAPTERS + file % PRESETS, Rare(None));
        host.make(&Call::ValuesOpenMemory(file, Rare(None)));
    }
    for call in calls.iter().take(MAX_CALLS) {
        host.make(call);
    }
    host.free_adapter();
    host.free_values();
});

/// What a C host keeps between calls.
struct Host {
    adapter: *mut Adapter,
    values: *mut Values,
    /// What the library lent, where and with which content: it must be there until the end.
    lent_by_adapter: Vec<(*const u8, Vec<u8>)>,
    lent_by_values: Vec<(*const u8, Vec<u8>)>,
    /// The words of the last failure.
    said: Vec<u8>,
}

impl Host {
    fn new() -> Self {
        Self {
            adapter: std::ptr::null_mut(),
            values: std::ptr::null_mut(),
            lent_by_adapter: Vec::new(),
            lent_by_values: Vec::new(),
            said: last_error(),
        }
    }

    /// Whether a call succeeded, which else failed as its documentation says.
    fn succeeded(&mut self, status: Status, documented: &[Status]) -> bool {
        let said = last_error();
        let words = std::str::from_utf8(&said).expect("words are UTF-8");
        if status == OK {
            assert_eq!(said, self.said, "success has left words");
            return true;
        }
        assert!(documented.contains(&status), "status {status}: {words}");
        assert!(!words.is_empty(), "status {status} without words");
        self.said = said;
        false
    }

    fn make(&mut self, call: &Call) {
        match call {
            Call::Library(status) => library(*status),
            Call::Open(path, null) => self.open(path, null),
            Call::AdapterOpen(path, null) => {
                let path = path.make(false);
                let open = |out| {
                    // SAFETY: here and below, pointers are NULL or lead to what the header asks for.
                    unsafe { vmix_adapter_open(pointer(&path), out) }
                };
                let documented = [NULL_ARGUMENT, INVALID_ARGUMENT, IO, INVALID_FILE];
                if let Some(adapter) = self.handle(null.is_some(), &documented, open) {
                    self.keep_adapter(adapter);
                }
            }
            Call::ValuesOpen(path, null) => {
                let path = path.make(false);
                // SAFETY: as above.
                let open = |out| unsafe { vmix_values_open(pointer(&path), out) };
                let documented = [NULL_ARGUMENT, INVALID_ARGUMENT, IO, INVALID_FILE];
                if let Some(values) = self.handle(null.is_some(), &documented, open) {
                    self.keep_values(values);
                }
            }
            Call::AdapterOpenMemory(file, null) => {
                let (data, size, _block) = file.make();
                // SAFETY: as above.
                let open = |out| unsafe { vmix_adapter_open_memory(data, size, out) };
                let documented = [NULL_ARGUMENT, INVALID_ARGUMENT, INVALID_FILE];
                if let Some(adapter) = self.handle(null.is_some(), &documented, open) {
                    self.keep_adapter(adapter);
                }
            }
            Call::ValuesOpenMemory(file, null) => {
                let (data, size, _block) = file.make();
                // SAFETY: as above.
                let open = |out| unsafe { vmix_values_open_memory(data, size, out) };
                let documented = [NULL_ARGUMENT, INVALID_ARGUMENT, INVALID_FILE];
                if let Some(values) = self.handle(null.is_some(), &documented, open) {
                    self.keep_values(values);
                }
            }
            Call::AdapterFree => self.free_adapter(),
            Call::ValuesFree => self.free_values(),
            Call::Info(handle, out) => {
                let documented = [NULL_ARGUMENT, INVALID_ARGUMENT];
                let (adapter, values) = (self.adapter, self.values);
                // SAFETY: as above.
                unsafe {
                    match handle {
                        Handle::Adapter => {
                            let ask = |out| vmix_adapter_info(adapter, out);
                            self.filled::<AdapterInfo>(out, &documented, ask);
                        }
                        Handle::Values => {
                            let ask = |out| vmix_values_info(values, out);
                            self.filled::<ValuesInfo>(out, &documented, ask);
                        }
                    }
                }
            }
            Call::Metadata(handle, key, null) => {
                let key = key.make();
                let (adapter, values) = (self.adapter, self.values);
                let documented = [NULL_ARGUMENT, NOT_FOUND];
                // SAFETY: as above.
                let ask = |out| unsafe {
                    match handle {
                        Handle::Adapter => vmix_adapter_metadata(adapter, pointer(&key), out),
                        Handle::Values => vmix_values_metadata(values, pointer(&key), out),
                    }
                };
                if let Some(text) = self.value(null.is_some(), &documented, ask) {
                    self.lend(*handle, text);
                }
            }
            Call::Label(handle, index, out) => {
                let index = index.make();
                let (adapter, values) = (self.adapter, self.values);
                let documented = [NULL_ARGUMENT, INVALID_ARGUMENT, OUT_OF_RANGE];
                // SAFETY: as above.
                let ask = |out| unsafe {
                    match handle {
                        Handle::Adapter => vmix_adapter_label(adapter, index, out),
                        Handle::Values => vmix_values_label(values, index, out),
                    }
                };
                if let Some(label) = self.filled::<Label>(out, &documented, ask) {
                    for text in [label.name, label.dimension, label.positive, label.negative] {
                        self.lend(*handle, text);
                    }
                    assert!(label.weight.is_finite() && label.low < label.high && label.step > 0.0);
                }
            }
            Call::LabelFind(handle, name, null) => {
                let name = name.make();
                let (adapter, values) = (self.adapter, self.values);
                let documented = [NULL_ARGUMENT, INVALID_ARGUMENT, NOT_FOUND];
                // SAFETY: as above.
                let ask = |out| unsafe {
                    match handle {
                        Handle::Adapter => vmix_adapter_label_find(adapter, pointer(&name), out),
                        Handle::Values => vmix_values_label_find(values, pointer(&name), out),
                    }
                };
                self.value::<usize>(null.is_some(), &documented, ask);
            }
            Call::LabelDisplayName(handle, index, language, null) => {
                let (index, language) = (index.make(), language.make());
                let (adapter, values) = (self.adapter, self.values);
                let documented = [NULL_ARGUMENT, OUT_OF_RANGE, NOT_FOUND];
                // SAFETY: as above.
                let ask = |out| unsafe {
                    let language = pointer(&language);
                    match handle {
                        Handle::Adapter => {
                            vmix_adapter_label_display_name(adapter, index, language, out)
                        }
                        Handle::Values => {
                            vmix_values_label_display_name(values, index, language, out)
                        }
                    }
                };
                if let Some(text) = self.value(null.is_some(), &documented, ask) {
                    self.lend(*handle, text);
                }
            }
            Call::Layer(handle, index, out) => {
                let index = index.make();
                let (adapter, values) = (self.adapter, self.values);
                let documented = [NULL_ARGUMENT, INVALID_ARGUMENT, OUT_OF_RANGE];
                // SAFETY: as above.
                let ask = |out| unsafe {
                    match handle {
                        Handle::Adapter => vmix_adapter_layer(adapter, index, out),
                        Handle::Values => vmix_values_layer(values, index, out),
                    }
                };
                if let Some(layer) = self.filled::<Layer>(out, &documented, ask) {
                    self.lend(*handle, layer.name);
                    if !layer.ldm_name.is_null() {
                        self.lend(*handle, layer.ldm_name);
                    }
                    assert!(layer.inner_dim > 0);
                }
            }
            Call::LayerFind(handle, name, null) => {
                let name = name.make();
                let (adapter, values) = (self.adapter, self.values);
                let documented = [NULL_ARGUMENT, INVALID_ARGUMENT, NOT_FOUND];
                // SAFETY: as above.
                let ask = |out| unsafe {
                    match handle {
                        Handle::Adapter => vmix_adapter_layer_find(adapter, pointer(&name), out),
                        Handle::Values => vmix_values_layer_find(values, pointer(&name), out),
                    }
                };
                self.value::<usize>(null.is_some(), &documented, ask);
            }
            Call::AesEmbed(weights, buffer) => {
                let expected = self.info().map(|i| i.label_count * i.context_dim);
                self.fill(weights, buffer, expected, vmix_adapter_aes_embed);
            }
            Call::Project(weights, buffer) => {
                let expected = self.info().map(|i| i.context_tokens * i.context_dim);
                self.fill(weights, buffer, expected, vmix_adapter_project);
            }
            Call::Values(null, weights, apply_to, dtype, size, more, null_out) => {
                let labels = self.info().map_or(0, |info| info.label_count);
                let (weights, weight_count, numbers) = weights.make(labels);
                let params = ValuesParams {
                    struct_size: 0,
                    weights,
                    weight_count,
                    apply_to: apply_to.make(),
                    dtype: dtype.make(),
                };
                let params = Block::of_struct(&params, size.of::<ValuesParams>(), *more);
                let pointer = if null.is_some() {
                    std::ptr::null()
                } else {
                    params.pointer()
                };
                let adapter = self.adapter;
                // SAFETY: as above.
                let compute = |out| unsafe { vmix_adapter_values(adapter, pointer, out) };
                let documented = [NULL_ARGUMENT, INVALID_ARGUMENT, UNSUPPORTED];
                let made = self.handle(null_out.is_some(), &documented, compute);
                assert!(params.is_untouched() && numbers.is_untouched());
                if let Some(values) = made {
                    self.keep_values(values);
                }
            }
            Call::Get(index, pass, out) => {
                let (values, index, pass) = (self.values, index.make(), pass.make());
                // SAFETY: as above.
                let ask = |out| unsafe { vmix_values_get(values, index, pass, out) };
                let documented = [NULL_ARGUMENT, INVALID_ARGUMENT, OUT_OF_RANGE];
                if let Some(view) = self.filled::<View>(out, &documented, ask) {
                    self.lend_view(pass, &view);
                }
            }
            Call::Copy(index, pass, heads, to) => self.copy(index, pass, heads.0, to),
            Call::Save(path) => self.save(path),
            Call::Mix(mix) => self.mix(mix),
            Call::Attention(attention) => self.attention(attention),
        }
    }

    /// A call that writes one plain value.
    fn value<T: Copy>(
        &mut self,
        null: bool,
        documented: &[Status],
        call: impl FnOnce(*mut T) -> Status,
    ) -> Option<T> {
        let out = Block::poisoned(size_of::<T>());
        let status = call(if null {
            std::ptr::null_mut()
        } else {
            out.pointer()
        });
        if self.succeeded(status, documented) {
            assert!(!null, "there was nowhere to write to");
            return Some(out.read());
        }
        assert!(out.is_untouched(), "a call that failed has written");
        None
    }

    /// A call that makes a handle.
    fn handle<T>(
        &mut self,
        null: bool,
        documented: &[Status],
        call: impl FnOnce(*mut *mut T) -> Status,
    ) -> Option<*mut T> {
        let handle = self.value(null, documented, call)?;
        assert!(!handle.is_null());
        Some(handle)
    }

    /// A call that fills a struct.
    fn filled<T: Struct>(
        &mut self,
        out: &Out,
        documented: &[Status],
        call: impl FnOnce(*mut T) -> Status,
    ) -> Option<T> {
        let size = out.1.of::<T>();
        // SAFETY: a plain struct, all bytes of which are valid.
        let poison: T = Block::poisoned(size_of::<T>()).read();
        let block = Block::of_struct(&poison, size, 0xa5);
        let null = out.0.is_some();
        let status = call(if null {
            std::ptr::null_mut()
        } else {
            block.pointer()
        });
        if !self.succeeded(status, documented) {
            assert!(block.is_untouched(), "a call that failed has written");
            return None;
        }
        assert!(!null, "there was nowhere to write to");
        assert_eq!(block.read::<usize>(), size, "struct_size is the caller's");
        let later = &block.bytes()[size_of::<T>()..];
        assert!(
            later.iter().all(|byte| *byte == 0),
            "unknown fields become zero"
        );
        Some(block.read())
    }

    fn open(&mut self, path: &Path, null: &Rare<bool>) {
        let path = path.make(false);
        let (adapter, values) = (Block::poisoned(8), Block::poisoned(8));
        let (mut to_adapter, mut to_values) = (adapter.pointer(), values.pointer());
        match null.0 {
            Some(false) => to_adapter = std::ptr::null_mut(),
            Some(true) => to_values = std::ptr::null_mut(),
            None => {}
        }
        // SAFETY: as above.
        let status = unsafe { vmix_open(pointer(&path), to_adapter, to_values) };
        if !self.succeeded(status, &[NULL_ARGUMENT, INVALID_ARGUMENT, IO, INVALID_FILE]) {
            assert!(adapter.is_untouched() && values.is_untouched());
            return;
        }
        assert!(!null.is_some());
        let (adapter, values) = (adapter.read::<*mut Adapter>(), values.read::<*mut Values>());
        assert!(adapter.is_null() != values.is_null());
        if adapter.is_null() {
            self.keep_values(values);
        } else {
            self.keep_adapter(adapter);
        }
    }

    fn keep_adapter(&mut self, adapter: *mut Adapter) {
        self.free_adapter();
        self.adapter = adapter;
    }

    fn keep_values(&mut self, values: *mut Values) {
        self.free_values();
        self.values = values;
    }

    fn free_adapter(&mut self) {
        check_lent(&mut self.lent_by_adapter);
        // SAFETY: NULL or not freed before.
        unsafe { vmix_adapter_free(std::mem::replace(&mut self.adapter, std::ptr::null_mut())) };
    }

    fn free_values(&mut self) {
        check_lent(&mut self.lent_by_values);
        // SAFETY: NULL or not freed before.
        unsafe { vmix_values_free(std::mem::replace(&mut self.values, std::ptr::null_mut())) };
    }

    fn lend(&mut self, by: Handle, text: *const c_char) {
        // SAFETY: the library's promise: a string.
        let content = unsafe { CStr::from_ptr(text) };
        assert!(content.to_str().is_ok());
        let lent = (text.cast(), content.to_bytes_with_nul().to_vec());
        match by {
            Handle::Adapter => self.lent_by_adapter.push(lent),
            Handle::Values => self.lent_by_values.push(lent),
        }
    }

    fn lend_view(&mut self, pass: u32, view: &View) {
        let [batch, tokens, heads, width] = view.shape;
        assert_eq!((batch, heads), (1, 1));
        assert_eq!(view.strides, [tokens * width, width, width, 1]);
        if view.data.is_null() {
            assert_eq!(pass, PASS_UNCOND);
            return;
        }
        let element = if view.dtype == DTYPE_F32 { 4 } else { 2 };
        let bytes = (tokens * width) as usize * element;
        // SAFETY: the library's promise: a dense tensor.
        let content = unsafe { std::slice::from_raw_parts(view.data.cast::<u8>(), bytes) };
        self.lent_by_values
            .push((view.data.cast(), content.to_vec()));
    }

    fn info(&self) -> Option<AdapterInfo> {
        if self.adapter.is_null() {
            return None;
        }
        let mut info: AdapterInfo = Block::poisoned(size_of::<AdapterInfo>()).read();
        info.struct_size = size_of::<AdapterInfo>();
        // SAFETY: a handle, and a struct to fill.
        assert_eq!(unsafe { vmix_adapter_info(self.adapter, &mut info) }, OK);
        Some(info)
    }

    /// A call that fills a buffer with numbers of an adapter.
    fn fill(
        &mut self,
        weights: &Floats,
        Buffer(null, other, overflow): &Buffer,
        expected: Option<usize>,
        call: unsafe extern "C" fn(*const Adapter, *const f32, usize, *mut f32, usize) -> Status,
    ) {
        let labels = self.info().map_or(0, |info| info.label_count);
        let (weights, weight_count, numbers) = weights.make(labels);
        let mut count = match &other.0 {
            Some(Small(count)) => *count,
            None => expected.unwrap_or(0).min(MAX_COUNT),
        };
        let out = Block::poisoned(count * 4);
        if let Some(Number(more)) = overflow.0 {
            count = more as usize | 1 << 62;
        }
        let to = if null.is_some() {
            std::ptr::null_mut()
        } else {
            out.pointer()
        };
        // SAFETY: as above.
        let status = unsafe { call(self.adapter, weights, weight_count, to, count) };
        let documented = [NULL_ARGUMENT, INVALID_ARGUMENT, BUFFER_SIZE, NOT_FOUND];
        if self.succeeded(status, &documented) {
            assert!(!null.is_some() && expected == Some(count));
        } else {
            assert!(out.is_untouched(), "a call that failed has written");
        }
        assert!(numbers.is_untouched());
    }

    fn copy(&mut self, index: &Index, pass: &Enumeration, heads: usize, to: &Tensor) {
        let (index, pass) = (index.make(), pass.make());
        let mut view: View = Block::poisoned(size_of::<View>()).read();
        view.struct_size = size_of::<View>();
        let (mut shape, mut there) = ([1, 2, 1, 2], true);
        // SAFETY: as above.
        let status = unsafe { vmix_values_get(self.values, index, pass, &mut view) };
        if status == OK {
            let [_, tokens, _, width] = view.shape.map(|size| size as usize);
            let heads = if heads != 0 && width % heads == 0 {
                heads
            } else {
                1
            };
            shape = [1, tokens, heads, width / heads];
            there = !view.data.is_null();
        }
        self.said = last_error();
        let to = to.pass(shape, true);
        // SAFETY: as above.
        let status = unsafe { vmix_values_copy(self.values, index, pass, to.pointer()) };
        let documented = [
            NULL_ARGUMENT,
            INVALID_ARGUMENT,
            OUT_OF_RANGE,
            NOT_FOUND,
            UNSUPPORTED,
        ];
        if self.succeeded(status, &documented) {
            assert!(there && !to.wrong && to.is_written_inside(), "{to:?}");
        } else {
            assert!(to.is_untouched(), "a call that failed has written");
        }
    }

    fn save(&mut self, path: &Path) {
        let path = path.make(true);
        // SAFETY: as above.
        let status = unsafe { vmix_values_save(self.values, pointer(&path)) };
        if !self.succeeded(status, &[NULL_ARGUMENT, INVALID_ARGUMENT, IO]) {
            return;
        }
        // SAFETY: as above.
        let open = |out| unsafe { vmix_values_open(pointer(&path), out) };
        let saved = self.handle(false, &[], open).expect("no status is allowed");
        self.keep_values(saved);
        let path = path.expect("it was written to");
        let path = std::ffi::OsStr::from_bytes(&path.before()[..path.len() - 1]);
        fs::remove_file(path).expect("it was written");
    }

    fn mix(&mut self, mix: &Mix) {
        let [batch, keys, heads, dim] = mix.shape.value();
        let value = mix.value.pass([batch, keys, heads, dim], true);
        let aes_value = mix.aes_value.pass(mix.shape.aes_value(), false);
        let inside = mix.inside.is_some() && value.data.len() > 0;
        let (strength, strength_count, numbers) = mix.strength.make(batch);
        let params = MixParams {
            struct_size: 0,
            value: value.pointer(),
            aes_value: if inside {
                value.pointer()
            } else {
                aes_value.pointer()
            },
            strength,
            strength_count,
        };
        let block = Block::of_struct(&params, mix.size.of::<MixParams>(), mix.more);
        let to = if mix.null.is_some() {
            std::ptr::null()
        } else {
            block.pointer()
        };
        // SAFETY: as above.
        let status = unsafe { vmix_mix_values(to) };
        let documented = [NULL_ARGUMENT, INVALID_ARGUMENT, UNSUPPORTED];
        if self.succeeded(status, &documented) {
            assert!(
                !value.wrong && (inside || !aes_value.wrong),
                "{value:?} {aes_value:?}"
            );
            assert!(!inside && value.is_written_inside(), "{value:?}");
        } else {
            assert!(value.is_untouched(), "a call that failed has written");
        }
        assert!(aes_value.is_untouched() && numbers.is_untouched() && block.is_untouched());
    }

    fn attention(&mut self, a: &Attention) {
        let [batch, keys, heads, dim] = a.shape.value();
        let queries = a.shape.queries();
        let query = a
            .query
            .pass([batch, queries, heads, dim], a.in_place.is_some());
        let key = a.key.pass([batch, keys, heads, dim], false);
        let value = a.value.pass([batch, keys, heads, dim], false);
        let aes_value = a.aes_value.as_ref().filter(|tensor| !tensor.is_null());
        let aes_value = aes_value.map(|tensor| tensor.pass(a.shape.aes_value(), false));
        let (strength, strength_count, numbers) = a.strength.make(batch);
        let broadcast = |mask: &Option<(Tensor, u8)>, shape: [usize; 4]| {
            let mask = mask.as_ref().filter(|(tensor, _)| !tensor.is_null());
            mask.map(|(tensor, ones)| {
                // Not queries times keys of a long one.
                let ones = if a.shape.is_long() { ones | 2 } else { *ones };
                let size = |i: usize| if ones >> i & 1 == 1 { 1 } else { shape[i] };
                tensor.pass([0, 1, 2, 3].map(size), false)
            })
        };
        let mask = broadcast(&a.mask, [batch, queries, heads, keys]);
        let query_mask = broadcast(&a.query_mask, [batch, queries, 1, 1]);
        let output = a.output.pass([batch, queries, heads, dim], true);
        let map = a.map.as_ref();
        let map = map.filter(|(tensor, ..)| !tensor.is_null() && !a.shape.is_long());
        let map = map.map(|(tensor, heads, _)| tensor.pass([batch, queries, heads.0, keys], true));
        let optional =
            |passed: &Option<Passed>| passed.as_ref().map_or(std::ptr::null(), Passed::pointer);
        let in_place = a.in_place.is_some();
        let params = AttentionParams {
            struct_size: 0,
            query: query.pointer(),
            key: key.pointer(),
            value: value.pointer(),
            aes_value: optional(&aes_value),
            strength,
            strength_count,
            scale: a.scale.0,
            padding: 0,
            mask: optional(&mask),
            query_mask: optional(&query_mask),
            output: if in_place {
                query.pointer()
            } else {
                output.pointer()
            },
            attention_map: optional(&map),
            attention_map_head: a.map.as_ref().map_or(0, |(.., first)| first.make()),
        };
        let block = Block::of_struct(&params, a.size.of::<AttentionParams>(), a.more);
        let to = if a.null.is_some() {
            std::ptr::null()
        } else {
            block.pointer()
        };
        // SAFETY: as above.
        let status = unsafe { vmix_attention(to) };
        let documented = [NULL_ARGUMENT, INVALID_ARGUMENT, UNSUPPORTED, OUT_OF_MEMORY];
        let done = self.succeeded(status, &documented);

        let mut read = vec![Some(&key), Some(&value), aes_value.as_ref(), mask.as_ref()];
        read.push(query_mask.as_ref());
        let mut written = vec![map.as_ref()];
        if in_place {
            written.push(Some(&query));
        } else {
            read.push(Some(&query));
            written.push(Some(&output));
        }
        for passed in read.iter().flatten() {
            assert!(
                passed.is_untouched(),
                "what is read was written: {passed:?}"
            );
            assert!(!done || !passed.wrong, "{passed:?}");
        }
        for passed in written.iter().flatten() {
            if done {
                assert!(!passed.wrong && passed.is_written_inside(), "{passed:?}");
            } else {
                assert!(passed.is_untouched(), "a call that failed has written");
            }
        }
        assert!(numbers.is_untouched() && block.is_untouched());
    }
}

impl Shape {
    /// A long one has rows of one number.
    fn is_long(&self) -> bool {
        self.long.is_some()
    }

    fn queries(&self) -> usize {
        self.queries.0 * if self.is_long() { 200 } else { 1 }
    }

    fn tokens(&self) -> usize {
        self.tokens.0 * if self.is_long() { 200 } else { 1 }
    }

    /// Of the values and keys.
    fn value(&self) -> [usize; 4] {
        let keys = self.tokens() * self.chunks.0;
        if self.is_long() {
            [
                self.batch.0.min(1),
                keys,
                self.heads.0.min(1),
                self.dim.0.min(1),
            ]
        } else {
            [self.batch.0, keys, self.heads.0, self.dim.0]
        }
    }

    fn aes_value(&self) -> [usize; 4] {
        let [batch, _, heads, dim] = self.value();
        let batch = if self.aes_batch { batch } else { 1 };
        if self.aes_heads {
            [batch, self.tokens(), heads, dim]
        } else {
            [batch, self.tokens(), 1, heads * dim]
        }
    }
}

impl Strength {
    fn make(&self, batch: usize) -> (*const f32, usize, Block) {
        self.values.make(if self.one { 1 } else { batch })
    }
}

impl Index {
    fn make(&self) -> usize {
        match self.1.0 {
            None => usize::from(self.0 % 3),
            Some(Number(index)) => index as usize,
        }
    }
}

impl Enumeration {
    fn make(&self) -> u32 {
        self.1.0.unwrap_or(u32::from(self.0 % 5))
    }
}

impl Text {
    /// None is NULL.
    fn make(&self) -> Option<Block> {
        match &self.1.0 {
            None => Some(Block::text(TEXTS[usize::from(self.0) % TEXTS.len()])),
            Some(bytes) => bytes.as_deref().map(Block::text),
        }
    }
}

impl Path {
    /// None is NULL. Nothing is written but in a folder for that.
    fn make(&self, written: bool) -> Option<Block> {
        let name = usize::from(self.0) % FILES.len();
        let path = match (&self.1.0, written) {
            (None, false) => FOLDER.join(name.to_string()),
            (None, true) => FOLDER.join("saved/file"),
            (Some(PathChange::Null), _) => return None,
            (Some(PathChange::Empty), _) => PathBuf::new(),
            (Some(PathChange::Absent), _) => FOLDER.join("saved/absent"),
            (Some(PathChange::Folder), _) => FOLDER.clone(),
            (Some(PathChange::InNoFolder), _) => FOLDER.join("absent/file"),
            (Some(PathChange::Name(name)), _) => {
                let end = name.iter().position(|byte| b"/\0".contains(byte));
                let name = &name[..end.unwrap_or(name.len())];
                FOLDER.join("saved").join(std::ffi::OsStr::from_bytes(name))
            }
        };
        Some(Block::text(path.as_os_str().as_bytes()))
    }
}

impl File {
    /// Pointer and size, and the memory behind them.
    fn make(&self) -> (*const c_void, usize, Block) {
        let mut bytes = FILES[usize::from(self.0) % FILES.len()].to_vec();
        match &self.1.0 {
            Some(FileChange::Byte(i, byte)) => {
                let i = usize::from(*i) % bytes.len();
                bytes[i] = *byte;
            }
            Some(FileChange::Cut(len)) => bytes.truncate(usize::from(*len)),
            Some(FileChange::Bytes(other)) => bytes.clone_from(other),
            _ => {}
        }
        let block = Block::new(bytes);
        match self.1.0 {
            Some(FileChange::Null(Number(size))) => (std::ptr::null(), size as usize, block),
            Some(FileChange::TooLong(Number(size))) => {
                (block.pointer(), size as usize | 1 << 63, block)
            }
            _ => (block.pointer(), block.len(), block),
        }
    }
}

fn pointer(text: &Option<Block>) -> *const c_char {
    text.as_ref()
        .map_or(std::ptr::null(), |block| block.pointer())
}

fn last_error() -> Vec<u8> {
    // SAFETY: a string that lives until the next failure.
    unsafe { CStr::from_ptr(vmix_last_error()) }
        .to_bytes()
        .to_vec()
}

fn library(status: u32) {
    // SAFETY: functions without pointers; strings that live forever.
    unsafe {
        assert_eq!(vmix_abi_version() >> 16, 1);
        for text in [vmix_version(), vmix_build_info(), vmix_status_name(status)] {
            assert!(!CStr::from_ptr(text).to_str().unwrap().is_empty());
        }
        vmix_set_num_threads(status as usize);
        assert!(vmix_num_threads() >= 1);
        assert!(status == 0 || vmix_num_threads() <= status as usize);
    }
}

/// What was lent is where it was, as it was.
fn check_lent(lent: &mut Vec<(*const u8, Vec<u8>)>) {
    for (pointer, content) in lent.drain(..) {
        // SAFETY: the library's promise: it lives as long as the handle.
        let now = unsafe { std::slice::from_raw_parts(pointer, content.len()) };
        assert_eq!(now, content);
    }
}
