from effdl.passes.base import Pass
class FoldBatchnorm(Pass):
    def run(self, model, ctx): return 0
