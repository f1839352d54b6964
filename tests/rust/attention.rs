//! Attention over tensors in any memory layout, against the paper's two branches in scalar f64.

use std::{array::from_fn, ptr};

use crate::parts::numbers;
use half::{bf16, f16};
use proptest::array::{uniform4, uniform8};
use proptest::{bool::weighted, collection::vec, option, prelude::*, sample::select};
use vmix::{
    Attention, DType, Data, Kernel, Result, Tensor, TensorView, TensorViewMut, attention,
    mix_values,
};

/// How a tensor lies in memory: its dtype, its dimensions from the outermost on, by how much the
/// stride of each is longer than needed, which are negative, and whether that of the batch is 0.
type Memory = (DType, [usize; 4], [usize; 4], [bool; 4], bool);

const DENSE: Memory = (DType::F32, [0, 1, 2, 3], [0; 4], [false; 4], false);

prop_compose! {
    fn memory()(
        dtype in select(vec![DType::F32, DType::F16, DType::BF16]),
        order in select(vec![[0, 1, 2, 3], [0, 2, 1, 3], [0, 1, 3, 2], [2, 3, 1, 0]]),
        padding in uniform4(prop_oneof![5 => Just(0), 1 => 1..4usize]),
        reversed in uniform4(weighted(0.2)),
        repeated: bool,
        // Often, or the paths for several dense tensors would hardly be taken.
        dense in weighted(0.4),
    ) -> Memory {
        if dense { DENSE } else { (dtype, order, padding, reversed, repeated) }
    }
}

/// What lies around elements: NaN in every dtype, so that it shows when it is read, too.
const AROUND: u32 = u32::MAX;

/// A host's tensor.
#[derive(Debug, Clone)]
struct Host {
    /// Longer than needed on both sides; of u32, to be aligned.
    words: Vec<u32>,
    /// Where the first element is, in bytes; nowhere: NULL.
    first: Option<usize>,
    dtype: DType,
    shape: [usize; 4],
    strides: [isize; 4],
}

impl Host {
    /// Elements without a value are like what is around them.
    fn new(memory: Memory, shape: [usize; 4], values: impl IntoIterator<Item = f32>) -> Self {
        const MARGIN: usize = 5;
        let (dtype, order, padding, reversed, repeated) = memory;
        let (mut strides, mut step, mut first) = ([0; 4], 1, MARGIN);
        for d in order.into_iter().rev().filter(|d| *d > 0 || !repeated) {
            let stride = step + padding[d];
            step = stride * shape[d];
            strides[d] = stride as isize * if reversed[d] { -1 } else { 1 };
            first += usize::from(reversed[d]) * stride * shape[d].saturating_sub(1);
        }
        let mut host = Self {
            words: vec![AROUND; step + 2 * MARGIN],
            first: Some(first * dtype.size()),
            dtype,
            shape,
            strides,
        };
        for (index, x) in indices(shape).zip(values) {
            host.set(index, bits_of(dtype, x));
        }
        host
    }

    fn at(&self, index: [usize; 4]) -> usize {
        let steps = (0..4).map(|d| index[d] as isize * self.strides[d]).sum();
        (self.first.unwrap() / self.dtype.size()).wrapping_add_signed(steps)
    }

    fn bits(&self, index: [usize; 4]) -> u32 {
        let at = self.at(index);
        match self.dtype {
            DType::F32 => self.words[at],
            _ => bytemuck::cast_slice::<_, u16>(&self.words)[at].into(),
        }
    }

    fn set(&mut self, index: [usize; 4], bits: u32) {
        let at = self.at(index);
        match self.dtype {
            DType::F32 => self.words[at] = bits,
            _ => bytemuck::cast_slice_mut::<_, u16>(&mut self.words)[at] = bits as u16,
        }
    }

    /// An element; tensors repeat along dimensions in which they are shorter than others.
    fn get(&self, index: [usize; 4]) -> f64 {
        number_of(self.dtype, self.bits(from_fn(|d| index[d] % self.shape[d]))).into()
    }

    /// Whether everything but the elements is as it was made.
    fn is_clean(&self) -> bool {
        let mut rest = self.clone();
        indices(self.shape).for_each(|index| rest.set(index, AROUND));
        rest.words.iter().all(|word| *word == AROUND)
    }

    /// Between its numbers, relative to them.
    fn dtype_step(&self) -> f64 {
        match self.dtype {
            DType::F32 => 0.0,
            DType::F16 => 2f64.powi(-10),
            DType::BF16 => 2f64.powi(-7),
        }
    }

    fn view(&self, name: &str) -> Result<TensorView<'_>> {
        let first = |first| self.words.as_ptr().cast::<u8>().wrapping_add(first);
        let data = self.first.map_or(ptr::null(), first);
        // SAFETY: `words` is borrowed and holds every element, or a test wants this refused.
        unsafe { TensorView::from_raw(name, data, self.dtype, self.shape, self.strides) }
    }

    fn view_mut(&mut self, name: &str) -> Result<TensorViewMut<'_>> {
        let first = |first| self.words.as_mut_ptr().cast::<u8>().wrapping_add(first);
        let data = self.first.map_or(ptr::null_mut(), first);
        // SAFETY: as above; mutably borrowed.
        unsafe { TensorViewMut::from_raw(name, data, self.dtype, self.shape, self.strides) }
    }
}

fn indices(shape: [usize; 4]) -> impl Iterator<Item = [usize; 4]> {
    let [_, l, h, d] = shape;
    let index = move |n| [n / (l * h * d), n / (h * d) % l, n / d % h, n % d];
    (0..shape.iter().product()).map(index)
}

fn bits_of(dtype: DType, x: f32) -> u32 {
    match dtype {
        DType::F32 => x.to_bits(),
        DType::F16 => f16::from_f32(x).to_bits().into(),
        DType::BF16 => bf16::from_f32(x).to_bits().into(),
    }
}

fn number_of(dtype: DType, bits: u32) -> f32 {
    match dtype {
        DType::F32 => f32::from_bits(bits),
        DType::F16 => f16::from_bits(bits as u16).to_f32(),
        DType::BF16 => bf16::from_bits(bits as u16).to_f32(),
    }
}

#[derive(Debug, Clone)]
struct Case {
    query: Host,
    key: Host,
    value: Host,
    v_a: Host,
    strength: Vec<f32>,
    scale: Option<f32>,
    mask: Option<Host>,
    query_mask: Option<Host>,
    output: Host,
    map: Option<(Host, usize)>,
    kernel: Option<Kernel>,
}

/// All that this processor has.
fn kernels() -> impl Iterator<Item = Kernel> {
    Kernel::ALL
        .into_iter()
        .filter(|kernel| kernel.is_available())
}

impl Case {
    /// With every kernel.
    fn each(&self) -> impl Iterator<Item = Self> {
        kernels().map(|kernel| Self {
            kernel: Some(kernel),
            ..self.clone()
        })
    }

    fn forward(&mut self, aesthetic: bool) -> Result<()> {
        let (query, key) = (self.query.view("query")?, self.key.view("key")?);
        let mut attention = Attention::new(query, key, self.value.view("value")?);
        let view = |host: Option<_>, name| host.map(|host: &Host| host.view(name)).transpose();
        attention.aes_value = view(aesthetic.then_some(&self.v_a), "aes_value")?;
        attention.mask = view(self.mask.as_ref(), "mask")?;
        attention.query_mask = view(self.query_mask.as_ref(), "query_mask")?;
        (attention.scale, attention.strength) = (self.scale, &self.strength);
        attention.kernel = self.kernel;
        let mut output = self.output.view_mut("output")?;
        let Some((map, head)) = &mut self.map else {
            return attention.forward(&mut output, None);
        };
        let mut map = map.view_mut("attention_map")?;
        attention.forward(&mut output, Some((&mut map, *head)))
    }

    fn mix(&mut self) -> Result<()> {
        let mut value = self.value.view_mut("value")?;
        mix_values(&mut value, self.v_a.view("aes_value")?, &self.strength)
    }

    fn strength(&self, b: usize) -> f32 {
        self.strength[b % self.strength.len()]
    }

    /// V_a where its heads may be one.
    fn aesthetic(&self, [b, t, h, c]: [usize; 4]) -> f64 {
        let [.., heads, dim] = self.value.shape;
        let row = if self.v_a.shape[2] == heads { h } else { 0 };
        self.v_a.get([b, t, row, (h - row) * dim + c])
    }

    /// softmax(Q·Kᵀ·scale + mask), for one query.
    fn weights(&self, b: usize, i: usize, h: usize) -> Vec<f64> {
        let [_, keys, _, dim] = self.key.shape;
        let scale = self.scale.map_or(1.0 / (dim as f64).sqrt(), f64::from);
        let score = |j| {
            let dot = (0..dim).map(|c| self.query.get([b, i, h, c]) * self.key.get([b, j, h, c]));
            let mask = self.mask.as_ref().map_or(0.0, |m| m.get([b, i, h, j]));
            dot.sum::<f64>() * scale + mask
        };
        // Scores are small enough to do without subtracting the largest one.
        let exp: Vec<f64> = (0..keys).map(|j| score(j).exp()).collect();
        let sum: f64 = exp.iter().sum();
        let weight = |x| if sum > 0.0 { x / sum } else { 0.0 };
        exp.into_iter().map(weight).collect()
    }

    /// Whether the output and the maps are the paper's two branches, and nothing else was written.
    fn check(&self) {
        let [batch, queries, heads, dim] = self.query.shape;
        for [b, i, h, _] in indices([batch, queries, heads, 1]) {
            let weights = self.weights(b, i, h);
            let region = |m: &Host| m.get([b, i, 0, 0]);
            let region = self.query_mask.as_ref().map_or(1.0, region);
            let lambda = f64::from(self.strength(b)) * region;
            for c in 0..dim {
                let sum = |v: &dyn Fn(usize) -> f64| -> f64 {
                    weights.iter().enumerate().map(|(j, w)| w * v(j)).sum()
                };
                let content = sum(&|j| self.value.get([b, j, h, c]));
                let aesthetic = sum(&|j| self.aesthetic([b, j, h, c]));
                close(&self.output, [b, i, h, c], content + lambda * aesthetic);
            }
            if let Some((map, first)) = &self.map
                && (*first..*first + map.shape[2]).contains(&h)
            {
                for (j, w) in weights.iter().enumerate() {
                    close(map, [b, i, h - first, j], *w);
                }
            }
        }
        assert!(self.output.is_clean());
        assert!(self.map.as_ref().is_none_or(|(map, _)| map.is_clean()));
    }
}

fn close(host: &Host, index: [usize; 4], expected: f64) {
    // In f32, scores are sums of 9 products of at most 2, so 9·18·2⁻²⁴ ≈ 1e-5 off; weights are
    // twice that, for numerator and denominator, and sums of values of at most 3 are 6e-5 off.
    // What is exactly zero was hidden, and is so. Rounding keeps the order.
    let tolerance = if expected == 0.0 { 0.0 } else { 1e-4 };
    let rounded = |x: f64| number_of(host.dtype, bits_of(host.dtype, x as f32)).into();
    let range = rounded(expected - tolerance)..=rounded(expected + tolerance);
    let found = host.get(index);
    assert!(range.contains(&found), "{index:?}: {found} for {expected}");
}

prop_compose! {
    /// Tensors that fit together. Outputs, and the values if they are to be mixed, do not repeat.
    fn cases(mixed: bool, large: bool)(
        (batch, queries, heads, dim) in if large {
            (1..3usize, 1..100usize, 1..3usize, 1..200usize)
        } else {
            (1..4usize, 1..7usize, 1..5usize, 1..10usize)
        },
        (tokens, chunks) in (if large { 1..80usize } else { 1..7usize }, 1..4usize),
        [q, k, mut v, a, m, r, mut o, mut p] in uniform8(memory()),
        [by_entry, merged, one] in any::<[bool; 3]>(),
        mut strength in vec(prop_oneof![Just(0.0), Just(-0.0), -2f32..2.0, -2f32..2.0], 3),
        scale in option::of(-2f32..2.0),
        // In which dimensions it varies, and below which number it hides: no, some or all keys.
        mask in option::of((any::<[bool; 4]>(), -1.2f32..1.0)),
        query_mask in option::of(any::<[bool; 2]>()),
        map in option::of((0..4usize, 0..5usize)),
        seed: u64,
    ) -> Case {
        let keys = tokens * chunks;
        let one_if = |one: bool, size| if one { 1 } else { size };
        let new = |memory, shape: [usize; 4], salt, hidden| {
            let hide = |x| if x < hidden { f32::NEG_INFINITY } else { x };
            let numbers = numbers(shape.iter().product(), seed ^ salt);
            Host::new(memory, shape, numbers.into_iter().map(hide))
        };
        strength.truncate(one_if(one, batch));
        (v.4, o.4, p.4) = (v.4 && !mixed, false, false);
        let [rows, width] = if merged { [1, heads * dim] } else { [heads, dim] };
        Case {
            query: new(q, [batch, queries, heads, dim], 1, -1.0),
            key: new(k, [batch, keys, heads, dim], 2, -1.0),
            value: new(v, [batch, keys, heads, dim], 3, -1.0),
            v_a: new(a, [one_if(!by_entry, batch), tokens, rows, width], 4, -1.0),
            strength,
            scale,
            mask: mask.map(|(varies, hidden)| {
                let full = [batch, queries, heads, keys];
                new(m, from_fn(|d| one_if(!varies[d], full[d])), 5, hidden)
            }),
            query_mask: query_mask.map(|[by_entry, by_query]| {
                new(r, [one_if(!by_entry, batch), one_if(!by_query, queries), 1, 1], 6, -1.0)
            }),
            output: Host::new(o, [batch, queries, heads, dim], []),
            map: map.map(|(first, count)| {
                let first = first % heads;
                (Host::new(p, [batch, queries, count.min(heads - first), keys], []), first)
            }),
            kernel: None,
        }
    }
}

proptest! {
    #[test]
    fn forward_is_the_papers_two_branches_in_any_layout(case in cases(false, false)) {
        for mut case in case.each() {
            case.forward(true).unwrap();
            case.check();
        }
    }

    #[test]
    fn any_number_of_threads_gives_the_same_bits(case in cases(false, true), threads in 2..5usize) {
        for mut one in case.each() {
            let mut many = one.clone();
            vmix::threads::set(1);
            one.forward(true).unwrap();
            vmix::threads::set(threads);
            many.forward(true).unwrap();
            prop_assert_eq!(one.output.words, many.output.words);
            prop_assert_eq!(one.map.map(|(map, _)| map.words), many.map.map(|(map, _)| map.words));
        }
    }

    #[test]
    fn batch_entries_of_strength_0_are_bit_identical_to_ones_without_v_a(case in cases(false, false)) {
        for mut case in case.each() {
            let mut plain = case.clone();
            plain.forward(false).unwrap();
            // Not even NaN in V_a makes a difference then, or ever to the maps.
            indices(case.v_a.shape).for_each(|index| case.v_a.set(index, AROUND));
            case.forward(true).unwrap();
            for index in indices(case.output.shape).filter(|i| case.strength(i[0]) == 0.0) {
                prop_assert_eq!(case.output.bits(index), plain.output.bits(index));
            }
            prop_assert_eq!(case.map.map(|(map, _)| map.words), plain.map.map(|(map, _)| map.words));
        }
    }

    /// Of sizes that fill tiles and leave rests, with scores up to ±10⁴.
    #[test]
    fn kernels_agree(mut case in cases(false, true), extreme in prop_oneof![Just(1f32), 1f32..1e4]) {
        let dim = case.query.shape[3] as f32;
        case.scale = Some(extreme / dim);
        let mut plain = Case { kernel: Some(Kernel::Plain), ..case.clone() };
        plain.forward(true).unwrap();
        // A score of s is s·2⁻²² off, and so is the logarithm of a weight; values are at most 6.
        let tolerance = f64::from(extreme) * 4.0 * 4e-6 + 2e-5;
        for mut case in case.each() {
            case.forward(true).unwrap();
            prop_assert!(case.output.is_clean());
            for index in indices(case.output.shape) {
                let [found, expected] = [&case, &plain].map(|case| case.output.get(index));
                let step = case.output.dtype_step() * expected.abs();
                prop_assert!((found - expected).abs() <= tolerance + step, "{:?} {index:?}: {found} for {expected}", case.kernel);
            }
        }
    }

    #[test]
    fn mixed_values_are_rounded_once_or_not_touched(
        mut case in cases(true, false),
        // Anything, and more often zeros with a sign and NaNs with a payload, of all dtypes.
        bits in vec(prop_oneof![any::<u32>(), select(vec![1 << 31, 1 << 15, 0x7F81_7F81])], 97),
    ) {
        for (index, bits) in indices(case.value.shape).zip(bits.iter().cycle()).step_by(2) {
            case.value.set(index, *bits);
        }
        check_mixed(case);
    }
}

fn check_mixed(mut case: Case) {
    let before = case.value.clone();
    case.mix().unwrap();
    for index in indices(before.shape) {
        let [v, found] = [&before, &case.value].map(|host| host.bits(index));
        let [v_c, mixed] = [v, found].map(|bits| number_of(before.dtype, bits));
        let strength = case.strength(index[0]);
        let sum = v_c + strength * case.aesthetic(index) as f32;
        let expected = if strength == 0.0 {
            v
        } else {
            bits_of(before.dtype, sum)
        };
        // Which of the NaNs a sum is, is the processor's choice.
        let any_nan = strength != 0.0 && sum.is_nan() && mixed.is_nan();
        assert!(found == expected || any_nan, "{mixed} for {sum}");
    }
    assert!(case.value.is_clean());
}

/// Tokens that are adjacent are mixed as one row, some thousand numbers at a time.
#[test]
fn whole_contexts_are_mixed() {
    const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];
    let of = |dtype, padding, shape: [usize; 4]| {
        let memory = (dtype, DENSE.1, padding, DENSE.3, DENSE.4);
        Host::new(memory, shape, numbers(shape.iter().product(), 3))
    };
    for (value, v_a) in DTYPES.iter().flat_map(|a| DTYPES.map(|b| (*a, b))) {
        for padding in [[0; 4], [0, 0, 0, 1], [0, 1, 0, 0]] {
            check_mixed(Case {
                value: of(value, padding, [2, 154, 3, 41]),
                v_a: of(v_a, padding, [1, 77, 3, 41]),
                ..plain(2, 1, 154, 3, 41)
            });
        }
    }
}

fn dense(shape: [usize; 4]) -> Host {
    Host::new(DENSE, shape, numbers(shape.iter().product(), 1))
}

fn plain(batch: usize, queries: usize, keys: usize, heads: usize, dim: usize) -> Case {
    Case {
        query: dense([batch, queries, heads, dim]),
        key: dense([batch, keys, heads, dim]),
        value: dense([batch, keys, heads, dim]),
        v_a: dense([1, keys / 2, heads, dim]),
        strength: vec![-0.5; batch],
        scale: None,
        mask: Some(dense([batch, queries, heads, keys])),
        query_mask: Some(dense([batch, queries, 1, 1])),
        output: Host::new(DENSE, [batch, queries, heads, dim], []),
        map: Some((Host::new(DENSE, [batch, queries, 1, keys], []), heads - 1)),
        kernel: None,
    }
}

/// What no number is, and what is hidden, with every kernel.
#[test]
fn masks_that_hide_or_are_no_numbers() {
    for kernel in kernels() {
        for (mask, expected) in [
            (f32::NEG_INFINITY, Some(0.0)),
            (f32::INFINITY, None),
            (f32::NAN, None),
        ] {
            let mut case = Case {
                kernel: Some(kernel),
                ..plain(1, 7, 20, 2, 19)
            };
            let mut hidden = dense([1, 7, 2, 20]);
            // All keys of the third query, of one head.
            for j in 0..20 {
                hidden.set([0, 2, 1, j], mask.to_bits());
            }
            case.mask = Some(hidden);
            case.forward(true).unwrap();
            for index in indices(case.output.shape) {
                let found = case.output.get(index);
                match expected {
                    _ if index[1..3] != [2, 1] => assert!(found.is_finite() && found != 0.0),
                    Some(expected) => assert_eq!(found, expected, "{kernel}"),
                    None => assert!(found.is_nan(), "{kernel}"),
                }
            }
        }
    }
}

/// The result may replace the query, also where tiles overlap at a block's end.
#[test]
fn results_in_the_place_of_the_query() {
    for kernel in kernels() {
        for queries in [1, 4, 5, 41, 83] {
            let mut case = Case {
                kernel: Some(kernel),
                ..plain(2, queries, 20, 3, 40)
            };
            case.map = None;
            case.forward(true).unwrap();
            let mut place = case.query.clone();
            let (data, dtype) = (place.words.as_mut_ptr().cast::<u8>(), DType::F32);
            let data = data.wrapping_add(place.first.unwrap());
            // SAFETY: `place` has all elements, and nobody else uses them.
            let (query, mut output) = unsafe {
                (
                    TensorView::from_raw("query", data, dtype, place.shape, place.strides).unwrap(),
                    TensorViewMut::from_raw("output", data, dtype, place.shape, place.strides)
                        .unwrap(),
                )
            };
            let (key, value) = (
                case.key.view("key").unwrap(),
                case.value.view("value").unwrap(),
            );
            let mut attention = Attention::new(query, key, value);
            attention.aes_value = Some(case.v_a.view("aes_value").unwrap());
            let masks = (
                case.mask.as_ref().unwrap(),
                case.query_mask.as_ref().unwrap(),
            );
            attention.mask = Some(masks.0.view("mask").unwrap());
            attention.query_mask = Some(masks.1.view("query_mask").unwrap());
            (attention.strength, attention.kernel) = (&case.strength, case.kernel);
            attention.forward(&mut output, None).unwrap();
            assert_eq!(
                place.words, case.output.words,
                "{kernel}, {queries} queries"
            );
        }
    }
}

#[test]
fn a_kernel_that_is_not_there() {
    let Some(kernel) = Kernel::ALL
        .into_iter()
        .find(|kernel| !kernel.is_available())
    else {
        return; // this processor has all
    };
    let mut case = Case {
        kernel: Some(kernel),
        ..plain(1, 1, 2, 1, 1)
    };
    let error = case.forward(true).unwrap_err().to_string();
    assert!(
        error.starts_with("kernel: expected a kernel that this processor has"),
        "{error}"
    );
}

/// More scores than are computed at a time.
#[test]
fn forward_of_many_tokens() {
    for mut case in plain(1, 1050, 1024, 2, 3).each() {
        case.forward(true).unwrap();
        case.check();
    }
}

/// What is wrong, and how an error about it starts and ends. The first 9 are of `mix_values`, too.
type Wrong = (fn(&mut Case), &'static str);

#[rustfmt::skip]
const WRONG: [Wrong; 27] = [
    (|c| c.v_a = dense([3, 2, 2, 4]), "aes_value: expected 1 batch entry, or 2…, found 3"),
    (|c| c.v_a = dense([1, 2, 2, 3]), "aes_value: expected 2 heads of 4, or 1 of …, found 2 of 3"),
    (|c| c.v_a = dense([1, 3, 2, 4]), "number of keys: expected a multiple of the 3 …, found 4"),
    (|c| c.v_a = dense([1, 0, 2, 4]), "number of keys: expected a multiple of the 0 …, found 4"),
    (|c| c.v_a.first = None, "aes_value: expected a pointer…found NULL for shape [1, 2, 2, 4]"),
    (|c| c.strength = vec![], "strength: expected 1 number, or 2, one per …, found 0"),
    (|c| c.strength = vec![0.0; 3], "strength: expected 1 number, or 2, one per …, found 3"),
    (|c| c.strength[1] = f32::NAN, "strength: expected finite numbers…, found NaN"),
    (|c| c.strength[0] = f32::INFINITY, "strength: expected finite numbers…, found inf"),
    (|c| c.query = dense([2, 3, 2, 5]), "key: expected shape [2, 4, 2, 5]…shape [2, 4, 2, 4]"),
    (|c| c.key = dense([1, 4, 2, 4]), "key: expected shape [2, 4, 2, 4]…shape [1, 4, 2, 4]"),
    (|c| c.value = dense([2, 5, 2, 4]), "value: expected shape [2, 4, 2, 4]…shape [2, 5, 2, 4]"),
    (|c| c.output = dense([2, 3, 1, 8]), "output: expected shape [2, 3, 2, 4]…shape [2, 3, 1, 8]"),
    (|c| c.mask = Some(dense([2, 3, 2, 2])), "mask: expected shape [2, 3, 2, 4], or…[2, 3, 2, 2]"),
    (|c| c.query_mask = Some(dense([2, 3, 2, 1])), "query_mask: expected shape […[2, 3, 2, 1]"),
    (|c| c.map = Some((dense([2, 3, 1, 5]), 0)), "attention_map: expected shape […[2, 3, 1, 5]"),
    (|c| c.map.as_mut().unwrap().1 = 2, "attention_map: expected some of 2 …1 heads from head 2 on"),
    (|c| c.map.as_mut().unwrap().1 = !0, "attention_map: expected some of 2 heads…615 on"),
    (|c| c.scale = Some(f32::INFINITY), "scale: expected a finite number…, found inf"),
    (|c| c.output.first = None, "output: expected a pointer…found NULL for shape [2, 3, 2, 4]"),
    (|c| c.query.first = Some(6), "query: expected float32 at a multiple of 4 bytes, found…"),
    (|c| (c.key.first, c.key.dtype) = (Some(3), DType::F16), "key: expected float16 at a …"),
    (|c| c.output.strides[0] = 0, "output: expected elements that do not overlap…, 8, 4, 1]"),
    (|c| c.output.strides[1] = 7, "output: expected elements that do not overlap…, 7, 4, 1]"),
    (|c| c.key.strides[3] = isize::MIN, "key: expected a tensor that fits…"),
    (|c| c.key.strides = [isize::MAX / 24; 4], "key: expected a tensor that fits…"),
    (|c| (c.key.shape[0], c.key.strides[0]) = (1 << 58, 0), "key: expected a tensor that fits…"),
];

#[test]
fn what_does_not_fit_is_named_and_nothing_is_written() {
    let runs: [fn(&mut Case) -> Result<()>; 2] = [|case| case.forward(true), Case::mix];
    for (n, (change, expected)) in WRONG.into_iter().enumerate() {
        let (start, end) = expected.split_once('…').unwrap();
        for run in &runs[..if n < 9 { 2 } else { 1 }] {
            let mut case = plain(2, 3, 4, 2, 4);
            run(&mut case.clone()).unwrap();
            change(&mut case);
            let before = format!("{case:?}");
            let error = run(&mut case).unwrap_err().to_string();
            assert!(error.starts_with(start) && error.ends_with(end), "{error}");
            assert_eq!(format!("{case:?}"), before);
        }
    }
}

#[test]
fn values_are_not_mixed_with_what_they_overlap() {
    let (shape, forward) = ([1, 2, 2, 2], [0, 4, 2, 1]);
    // 8 halves before, in and behind 8 values that start at 16. As halves, 1f32 is 0 and 1.875.
    let layouts = |start| [(start, start, 1), (start, start + 7, -1)];
    for (start, first, sign) in (8..=32).flat_map(layouts) {
        let mut words = [1f32; 24];
        let data = words.as_mut_ptr().cast::<u16>();
        let [value, v_a] = [16, first].map(|i| data.wrapping_add(i).cast());
        // SAFETY: in `words`; where they overlap, they are refused before they are used.
        let value = unsafe { TensorViewMut::from_raw("x", value, DType::F32, shape, forward) };
        let strides = forward.map(|x| x * sign);
        // SAFETY: as above.
        let v_a = unsafe { TensorView::from_raw("x", v_a, DType::F16, shape, strides) };
        let mixed = mix_values(&mut value.unwrap(), v_a.unwrap(), &[1.0]);
        let named = mixed.map_err(|e| e.to_string().starts_with("aes_value: expected memory"));
        let (apart, refused) = ((Ok(()), 31.5), (Err(true), 24.0));
        let expected = if start % 24 == 8 { apart } else { refused };
        assert_eq!((named, words.iter().sum::<f32>()), expected, "{start}");
    }
}

#[test]
fn tensors_without_elements_may_be_anywhere() {
    for v_a in [[0, 2, 2, 3], [0, 2, 1, 6]] {
        let mut case = plain(0, 3, 4, 2, 3);
        case.v_a = dense(v_a);
        (case.mask, case.query_mask, case.map) = (None, None, None);
        for host in [&mut case.value, &mut case.v_a, &mut case.output] {
            (host.first, host.strides) = (None, [isize::MAX; 4]);
        }
        case.forward(true).unwrap();
        case.mix().unwrap();
    }
    // Their sizes are neither gone through nor multiplied.
    let v_a = [0f32; 8];
    for (shape, v_a_shape) in [
        ([0, 4, 8, 1 << 62], [0, 1, 8, 1 << 62]),
        ([1 << 60, 0, 2, 4], [1, 1, 2, 4]),
        ([1, 1 << 60, 0, 4], [1, 1, 0, 4]),
    ] {
        // SAFETY: of both views, one has no elements, and the other those of `v_a`.
        unsafe {
            let strides = [8, 8, 4, 1];
            let value =
                TensorViewMut::from_raw("value", ptr::null_mut(), DType::F32, shape, strides);
            let v_a = v_a.as_ptr().cast();
            let v_a = TensorView::from_raw("v_a", v_a, DType::F32, v_a_shape, strides);
            mix_values(&mut value.unwrap(), v_a.unwrap(), &[1.0]).unwrap();
        }
    }
    let none = Tensor::new([0, 1 << 40, 1 << 40], Data::F32(vec![]));
    let v_a = Tensor::new([0, 1 << 40], Data::F32(vec![]));
    assert!(attention(&none, &none, &none, &v_a, 1.0, 1 << 20).is_err());
}
