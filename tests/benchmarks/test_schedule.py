import pytest

from benchmarks.schedule import cycles_of_kernel

# As the TPU's compiler writes them, shortened: three steps, in each of which four words go by.
KERNEL = """
= control target key start
LB: loop body
= control target key end

     0   :  { %s1 = smov.u32 0 }
   0x1   :  { %s2 = smov.u32 0 } /* Start region 1 */
   0x2 LB: > { %s3 = sadd.s32 1, %s2 }
   0x3   : > { %p4 = scmp.ge.s32.totalorder %s3, 5 /* loop exit test */ }
   0x4 LB: >> { %s5 = sadd.s32 1, %s6  ;;  %v1 = vld [vmem:[%s7] sm:$0xff] }
   0x5   : >> { %p8 = scmp.ge.s32.totalorder (%p9), %s5, 4 /* loop exit test */ }
   0x6   : >> { %10 = sbr.rel (!%p8) target = $region2 }
   0x7   :  { %v2 = vadd.f32 %v1, %v1 }
   0x8   :  { %11 = vst [vmem:[%s7] sm:$0xff] %v2 }
   0x9   :  { %12 = vst [vmem:[%s7] sm:$0xff] %v2 }
   0xa   : > { %13 = sbr.rel (%p14) target = $region3 }
   0xb   : > { %15 = sbr.rel (!%p4) target = $region4 }
   0xc   : > { %16 = vst [vmem:[%s7] sm:$0xff] %v2 }
   0xd   : > { %17 = vst [vmem:[%s7] sm:$0xff] %v2 }
   0xe   : > { %18 = vst [vmem:[%s7] sm:$0xff] %v2 }
   0xf   :  { %19 = vnop }
"""


def test_bundles_count_as_often_as_their_loops_go_round():
    # Six of the inner loop, with what follows on its jump; seven others of the outer one.
    assert cycles_of_kernel(KERNEL) == 3 * (4 * 6 + 7) + 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("HloModule jit_f", "final bundles, got 'HloModule jit_f'"),
        (KERNEL.replace("4 /* loop exit test */", "%s20"), "How often 1 of the kernel's loops"),
    ],
)
def test_what_cannot_be_counted_is_said(text, message):
    with pytest.raises(ValueError, match=message):
        cycles_of_kernel(text)
